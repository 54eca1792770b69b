// Package report carries what the agent knows to those who only listen: the serial port and Prometheus.
//
// The rule of the package: nothing here can hold up a pass. A [Mailbox] holds the newest value for a reader who may be slow; [Serial]
// queues lines for a port that may block for ever, and drops the oldest; [Metrics] takes one plain [Sample] a pass and is read by
// scrapes at their own time.
//
// Guest attributes have a rate budget and a package of their own, guestattr. What is worth saying is decided by package agent, in words
// that package symptom found.
package report

import "sync"

// Mailbox holds one value, the newest. Make it with [NewMailbox]; all methods may be called from any goroutine.
//
//	views := report.NewMailbox[View]()
//	views.Put(v)        // the writer never waits
//	v := <-views.Get()  // the reader sees the newest, each value at most once
type Mailbox[T any] struct {
	mu   sync.Mutex
	slot chan T
}

// NewMailbox returns an empty Mailbox.
func NewMailbox[T any]() *Mailbox[T] { return &Mailbox[T]{slot: make(chan T, 1)} }

// Put leaves v in the slot in place of what may still be there, and says whether it replaced something nobody had taken.
func (m *Mailbox[T]) Put(v T) (replaced bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.slot:
		replaced = true
	default:
	}
	m.slot <- v // has room: only Put sends, one at a time
	return replaced
}

// Get is where the newest value is received from.
func (m *Mailbox[T]) Get() <-chan T { return m.slot }
