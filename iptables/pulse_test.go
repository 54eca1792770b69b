package iptables

import (
	"testing"
	"time"
)

// TestPulse: it beats again and again, at once when it is told, and not after it was closed.
func TestPulse(t *testing.T) {
	p, err := newPulse(10 * time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for range 5 {
		if !p.wait() {
			t.Fatal("closed")
		}
	}
	if took := time.Since(began); took < 40*time.Millisecond {
		t.Errorf("five beats of 10 ms within %v", took)
	}
	p.close()
	if p.wait() {
		t.Error("it beats on")
	}

	slow, err := newPulse(time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	beat := make(chan bool)
	go func() { beat <- slow.wait() }()
	slow.now()
	if !<-beat {
		t.Error("closed")
	}
	go func() { beat <- slow.wait() }()
	slow.close()
	if <-beat {
		t.Error("it beats on")
	}
}
