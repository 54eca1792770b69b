package iptables

import (
	"errors"
	"testing"
)

func TestOtherBackendOfNoneKnown(t *testing.T) {
	if found, err := OtherBackend(t.Context(), ""); len(found) > 0 ||
		!errors.Is(err, ErrCouldNotLook) {
		t.Errorf("%v %v", found, err)
	}
}
