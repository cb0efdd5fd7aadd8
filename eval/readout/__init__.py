"""Linear read-out and k-NN of a run on part of a data set."""
