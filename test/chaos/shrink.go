package chaos

// Shrink looks for a shorter sequence that still fails: Zeller's ddmin. fails plays one, and is
// asked at most tries times; what it says of a game may be chance, so it should play a game that
// passes once more. The result is the shortest that was seen to fail.
func Shrink(sequence []Event, tries int, fails func([]Event) bool) []Event {
	parts := 2
	for len(sequence) > 1 && tries > 0 {
		size := (len(sequence) + parts - 1) / parts
		found := false
		for start := 0; start < len(sequence) && tries > 0; start += size {
			end := min(start+size, len(sequence))
			rest := append(append([]Event(nil), sequence[:start]...), sequence[end:]...)
			if len(rest) == 0 {
				continue
			}
			tries--
			if fails(rest) {
				sequence, found = rest, true
				parts = max(parts-1, 2)
				break
			}
		}
		if found {
			continue
		}
		if parts >= len(sequence) {
			break
		}
		parts = min(2*parts, len(sequence))
	}
	return sequence
}
