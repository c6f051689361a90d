"""Language models as emendo sees them: loading, texts, editable sites, the frozen trunk, and gradient factors."""
