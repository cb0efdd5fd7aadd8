"""Published numbers, records of ours, and the pages made of them."""
