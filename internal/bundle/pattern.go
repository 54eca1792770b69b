package bundle

import (
	"regexp"
	"sync"
)

// pattern is compiled when it is first used. The daemon has this package linked in, as package
// agent writes what a bundle holds, and never makes one: its patterns were half a megabyte.
func pattern(text string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(text) })
}
