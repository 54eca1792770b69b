// Package mailbox hands the newest value from one goroutine to another, of which neither ever waits
// for the other. What a slow reader has not taken is replaced: whoever must see every value needs a
// queue.
package mailbox

import "sync"

// Box holds one value, the newest. Make it with [New]. All methods may be called from any
// goroutine.
//
//	views := mailbox.New[View]()
//	views.Put(v)        // the writer never waits
//	v := <-views.Get()  // the reader sees the newest, each value at most once
type Box[T any] struct {
	mu   sync.Mutex
	slot chan T
}

// New returns an empty Box.
func New[T any]() *Box[T] { return &Box[T]{slot: make(chan T, 1)} }

// Put leaves v in the slot in place of what may still be there, and says whether it replaced
// something nobody had taken.
func (b *Box[T]) Put(v T) (replaced bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-b.slot:
		replaced = true
	default:
	}
	b.slot <- v // has room: only Put sends, one at a time
	return replaced
}

// Get is where the newest value is received from.
func (b *Box[T]) Get() <-chan T { return b.slot }
