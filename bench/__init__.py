"""How much a gateway costs: loragate beside its peers, measured on one machine in one run."""
