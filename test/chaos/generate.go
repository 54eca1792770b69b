package chaos

import (
	"math/rand/v2"
	"time"
)

// Generate draws a sequence of about length, with a calm each calmEvery and at the end. Faults of
// one group never overlap; those of different ones do.
func Generate(random *rand.Rand, faults []Fault, length, calmEvery time.Duration) []Event {
	var sequence []Event
	busy := map[string]time.Duration{}
	weights := 0
	for _, f := range faults {
		weights += f.Weight
	}
	nextCalm := calmEvery
	for at := time.Duration(0); ; {
		at += time.Duration(random.ExpFloat64() * float64(meanPause))
		if at >= nextCalm || at >= length {
			at = min(nextCalm, length)
			sequence = append(sequence, Event{At: at, Name: Calm})
			nextCalm += calmEvery
			clear(busy) // a calm takes all back
			if at >= length {
				return sequence
			}
			continue
		}
		f := draw(random, faults, weights)
		if busy[f.Group] > at || busy[f.Also] > at {
			continue
		}
		e := Event{At: at, Name: f.Name, Seed: random.Uint32()}
		if f.Longest > 0 {
			e.Hold = f.Shortest + time.Duration(random.Float64()*float64(f.Longest-f.Shortest))
			e.Hold = e.Hold.Round(time.Millisecond)
		}
		e.At = e.At.Round(time.Millisecond)
		busy[f.Group], busy[f.Also] = at+e.Hold, at+e.Hold
		busy[""] = 0
		sequence = append(sequence, e)
	}
}

// meanPause is between two faults. Many last longer than that, so that some are always on together.
const meanPause = 900 * time.Millisecond

func draw(random *rand.Rand, faults []Fault, weights int) Fault {
	n := random.IntN(weights)
	for _, f := range faults {
		if n -= f.Weight; n < 0 {
			return f
		}
	}
	panic("unreachable: n is below the sum of the weights")
}
