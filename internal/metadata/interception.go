package metadata

import (
	"context"
	"strings"
	"time"
)

// InterceptionKey is the metadata key of the emergency brake: an operator sets it on an instance,
// or for a fleet on the project, and needs no login.
const InterceptionKey = "service-proxy-agent-interception"

// Place is where a metadata key is set. An instance's key wins over its project's.
type Place string

// The places.
const (
	OfInstance Place = "instance"
	OfProject  Place = "project"
)

// path of the key at a place, relative to computeMetadata/v1/.
func (p Place) path() string { return string(p) + "/attributes/" + InterceptionKey }

// Wish is what the key asks for.
type Wish string

const (
	// WishOff: no jump leads to Envoy.
	WishOff Wish = "off"
	// WishBypass: as with --when-envoy-down=bypass.
	WishBypass Wish = "bypass-when-down"
)

// Interception is one look at the key at one place. Without Err, the server has answered: Set says
// whether the key is there. Err: [*Error].
type Interception struct {
	Set   bool
	Value string // as it was read, at most maxInterception bytes of it
	Err   error
}

// maxInterception bounds what is kept of a value: more than any that is understood.
const maxInterception = 256

// Wish is what the value asks for; ok is false where it is understood by nobody. Who pulls a brake
// is in a hurry: capitals, and white space around it, as a file that ends in a new line has, do
// not matter.
func (i Interception) Wish() (w Wish, ok bool) {
	switch w = Wish(strings.ToLower(strings.TrimSpace(i.Value))); w {
	case WishOff, WishBypass:
		return w, true
	}
	return "", false
}

// ReadInterception looks at the key once.
func ReadInterception(ctx context.Context, at Place) Interception {
	text, _, err := get(ctx, at.path(), "", pace{})
	return looked(text, err)
}

func looked(text []byte, err error) Interception {
	switch {
	case err == nil:
		return Interception{Set: true, Value: string(text[:min(len(text), maxInterception)])}
	case isMissing(err):
		return Interception{}
	}
	return Interception{Err: err}
}

// interceptionPace has whatever becomes of the key seen within some seconds. A key that comes is
// found by asking for it. Of one that goes no document says that a long poll is answered then: so a
// poll is a short one.
var interceptionPace = pace{held: 4 * time.Second, patience: 5 * time.Second,
	absent: 2 * time.Second, away: 4 * time.Second}

// WatchInterception calls emit with the key as it is, and again whenever it or the way it cannot
// be read has changed, until ctx ends. An error never repeats. What to make of one is up to the
// caller: the daemon changes nothing for it.
func WatchInterception(ctx context.Context, at Place, emit func(Interception)) {
	var last Interception
	first := true
	follow(ctx, at.path(), interceptionPace, func(text []byte, err error) {
		i := looked(text, err)
		if !first && i.Set == last.Set && i.Value == last.Value &&
			errorText(i.Err) == errorText(last.Err) {
			return
		}
		first, last = false, i
		emit(i)
	})
}
