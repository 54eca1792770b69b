package metadata

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
)

// attributePath is the attribute's, relative to computeMetadata/v1/.
const attributePath = "instance/attributes/" + attribute.Name

// ErrNoAttribute is the error of a VM without the gce-service-proxy attribute.
var ErrNoAttribute = fmt.Errorf("%w; create its template with "+
	"gcloud compute instance-templates create --service-proxy enabled", attribute.ErrMissing)

// Attribute is one look at the attribute: Config when Err is nil, else Err: [ErrNoAttribute],
// [attribute.ErrAnthos], an [*attribute.KeyError] or an [*Error]. Text is the attribute's text as
// far as it was read.
type Attribute struct {
	Config attribute.Config
	Text   []byte
	Err    error
}

// ReadAttribute reads and parses the attribute once.
func ReadAttribute(ctx context.Context) Attribute {
	text, _, err := get(ctx, attributePath, "")
	if err != nil {
		return Attribute{Err: err}
	}
	return parse(text)
}

func parse(text []byte) Attribute {
	a := Attribute{Text: text}
	a.Config, a.Err = attribute.Parse(text)
	return a
}

// Watch calls emit with the attribute as it is, and again whenever it or the way it cannot be read
// has changed, until ctx ends. An error never repeats, so that emit may log it. What to make of an
// error is up to the caller: the daemon keeps the last good Config.
//
// It polls by itself: SubscribeWithContext of cloud.google.com/go/compute/metadata returns when the
// key is missing, sends no timeout_sec and sleeps deaf to its context.
//
// answered, if not nil, is called at each answer that can be used, news or not: the server is well.
func Watch(ctx context.Context, answered func(), emit func(Attribute)) {
	var last Attribute
	first, etag, wait := true, "", time.Duration(0)
	say := func(a Attribute) {
		if !first && string(a.Text) == string(last.Text) && errorText(a.Err) == errorText(last.Err) {
			return
		}
		first, last = false, a
		emit(a)
	}
	for ctx.Err() == nil {
		text, newETag, err := get(ctx, attributePath, etag)
		if answered != nil && (err == nil || errors.Is(err, ErrNoAttribute)) {
			answered()
		}
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			say(parse(text))
			wait = 0
			if newETag == "" || newETag == "0" { // a server that cannot wait: poll
				wait = watchPoll
			}
			etag = newETag
		case errors.Is(err, ErrNoAttribute):
			say(Attribute{Err: err})
			// A missing key answers at once, even with wait_for_change.
			etag, wait = "", watchPoll
		default:
			// One lost answer of a long poll is no news: the next one says whether the server is
			// really away.
			if wait > 0 || first {
				say(Attribute{Text: last.Text, Err: err})
			}
			etag, wait = "", min(max(2*wait, time.Second), 30*time.Second)
		}
		if !sleep(ctx, wait) {
			return
		}
	}
}

// watchPoll is how often a key is asked for that the server cannot wait for. The server is on the
// host: an ask costs nothing.
const watchPoll = 5 * time.Second

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// sleep waits for d and says whether ctx is still alive.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
