"""What happens between steps, one file each."""
