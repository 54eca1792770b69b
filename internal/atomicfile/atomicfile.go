// Package atomicfile replaces a file so that a reader, or the next boot after a power cut, sees the
// old content or the new, never half of one. It knows nothing of what is written; state, bootstrap
// and the readiness file use it.
package atomicfile

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Write puts data into path with this mode (the umask does not apply), by a new file beside it
// and rename(2). The new file is made with O_EXCL under a random name, so a link planted in the
// folder is never followed.
func Write(path string, data []byte, mode os.FileMode) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, prefix(path))
	if err != nil {
		return fmt.Errorf("write %q: %w", path, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
			err = fmt.Errorf("write %q: %w", path, err)
		}
	}()
	if _, err = f.Write(data); err != nil {
		return err
	}
	if err = f.Chmod(mode); err != nil {
		return err
	}
	// Without it a power cut after the rename can leave an empty file (ext4 with delayed allocation).
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// prefix begins the name of a new file that is to replace path.
func prefix(path string) string { return "." + filepath.Base(path) + "." }

// Sweep removes what is left of a Write to path by a process that was killed. Nobody may write
// there just then.
func Sweep(path string) {
	entries, _ := os.ReadDir(filepath.Dir(path)) // what can be read
	for _, e := range entries {
		number, is := strings.CutPrefix(e.Name(), prefix(path))
		if is && number != "" && strings.Trim(number, "0123456789") == "" {
			os.Remove(filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
}
