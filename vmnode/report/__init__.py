"""What is known, as ClassAd lines, JSON and tables. Pure: nothing here reads or changes the machine."""
