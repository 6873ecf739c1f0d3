"""The conformance kit: runs the specification's vectors against any port and says which clause it breaks."""
