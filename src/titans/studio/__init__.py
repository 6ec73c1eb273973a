"""`titans studio`: a page to see the memory at work, on top of `titans.serve`."""
