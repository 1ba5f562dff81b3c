"""Instructions hidden in documents: what they ask for (tasks), how they are put (styles), and rows with them
(sources)."""
