package mailbox

import "testing"

func TestBox(t *testing.T) {
	b := New[int]()
	if b.Put(1) {
		t.Error("the first Put replaced something")
	}
	if !b.Put(2) {
		t.Error("the second Put replaced nothing")
	}
	if v := <-b.Get(); v != 2 {
		t.Errorf("got %d; want the newest, 2", v)
	}
	select {
	case v := <-b.Get():
		t.Errorf("got %d twice", v)
	default:
	}

	// Many writers never wait, and the reader's last value is the last one put.
	done := make(chan struct{})
	go func() {
		defer close(done)
		for v := range b.Get() {
			if v == -1 {
				return
			}
		}
	}()
	put := make(chan struct{})
	for range 4 {
		go func() {
			for i := range 1000 {
				b.Put(i)
			}
			put <- struct{}{}
		}()
	}
	for range 4 {
		<-put
	}
	b.Put(-1)
	<-done
}
