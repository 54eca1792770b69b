package iptables

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestAside: what hangs is left alone when the time is over.
func TestAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		end := make(chan struct{})
		defer close(end)
		began := time.Now()
		_, err := aside(ctx, func() (int, error) { <-end; return 1, nil })
		if !errors.Is(err, ErrCouldNotLook) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("it hangs: %v", err)
		}
		if took := time.Since(began); took != time.Second {
			t.Errorf("took %v", took)
		}
		broken := errors.New("broken")
		if got, err := aside(t.Context(), func() (int, error) { return 7, broken }); got != 7 ||
			!errors.Is(err, broken) {
			t.Errorf("%v %v", got, err)
		}
	})
}
