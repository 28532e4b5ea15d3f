"""What a block can become: operations, its graph, the supernet over it, and the strategies that search it."""
