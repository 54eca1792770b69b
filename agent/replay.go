package agent

import "errors"

// Replay reads what Record wrote. It asks nobody anything.
func Replay([]byte) (Looked, error) {
	return Looked{}, errors.New("replay a look: not yet")
}
