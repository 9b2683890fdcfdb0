"""What changes the parameters and the balancing biases."""
