"""Linear probe and k-NN of a frozen encoder."""
