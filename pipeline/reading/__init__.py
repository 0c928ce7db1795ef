"""Which sample comes when, and its bytes. In come a `Source`, a seed and a step; out come screened encoded images
with their sample ids. `order` is arithmetic alone, `reader` fetches and screens, `quarantine` remembers bad samples,
`ahead` keeps batches ready for their consumer, and `quality` measures how well an order is shuffled."""
