//go:build race

package agent

// shuffledSequences is how many sequences TestShuffled plays under the race detector, which makes
// it ten times as slow and finds little in one goroutine.
const shuffledSequences = 200

// hourBackends is on how many backends TestAnHour plays.
const hourBackends = 1
