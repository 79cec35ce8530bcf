"""What travels between the layers: plain data, nothing that acts."""
