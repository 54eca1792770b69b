//go:build race

package envoyadmin

func init() { raceDetector = true } // it multiplies CPU time
