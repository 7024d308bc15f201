"""Starting ranks. Imports no torch: the parent of a run must answer within a second."""
