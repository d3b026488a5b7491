"""What a person sees of a generation: coloured text in a terminal, a comparison, a report page."""
