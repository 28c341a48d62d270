"""Values that cross layers: requests, status, events, instructions."""
