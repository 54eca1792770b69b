package untrusted

import (
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
)

// A file that is replaced by rename while it is read is the file that was there: bootstrap's state,
// which changes under the daemon that reads it.
func TestReadReplaced(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "file")
	replace := func() {
		temp := filepath.Join(dir, "new")
		if err := os.WriteFile(temp, []byte("text"), 0o600); err != nil {
			t.Error(err)
		}
		if err := os.Rename(temp, name); err != nil {
			t.Error(err)
		}
	}
	replace()
	var stop atomic.Bool
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for !stop.Load() {
			replace()
		}
	}()
	for range 5000 {
		if text, err := ReadFile(name, 100); err != nil || string(text) != "text" {
			t.Errorf("have %q, %v", text, err)
			break
		}
	}
	stop.Store(true)
	<-ended
}
