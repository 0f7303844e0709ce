"""The steps from one schema of a study's database to the next; `clip_lab.humans.store.upgrade` runs them."""
