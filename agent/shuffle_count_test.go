//go:build !race

package agent

// shuffledSequences is how many sequences TestShuffled plays.
const shuffledSequences = 10_000

// hourBackends is on how many backends TestAnHour plays.
const hourBackends = 2
