package envoyadmin

import "time"

// Bucket is how a Detector's token bucket stands: the time of Envoy's main thread that questions
// may take.
type Bucket struct {
	Level time.Duration // what may be taken now; below 0: it was overdrawn by the last answer
	Size  time.Duration // what it holds at most
	Share float64       // of the time, 0 to 1, by which it is refilled
}
