package metadata

import (
	"context"
	"errors"
	"fmt"
	"net/http"
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
	text, _, err := get(ctx, attributePath, "", pace{})
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
	first := true
	follow(ctx, attributePath, attributePace, func(text []byte, err error) {
		var a Attribute
		switch {
		case err == nil:
			a = parse(text)
		case errors.Is(err, ErrNoAttribute):
			a.Err = err
		default:
			a = Attribute{Text: last.Text, Err: err}
		}
		if answered != nil && (err == nil || errors.Is(err, ErrNoAttribute)) {
			answered()
		}
		if !first && string(a.Text) == string(last.Text) && errorText(a.Err) == errorText(last.Err) {
			return
		}
		first, last = false, a
		emit(a)
	})
}

// pace is how a key is asked for again.
type pace struct {
	// held is for how long the server holds a question for a change of a key that is there.
	held time.Duration
	// patience is how much longer its answer may take.
	patience time.Duration
	// absent is how often a key is asked for that the server cannot wait for: one that is missing
	// answers at once, even with wait_for_change. The server is on the host: an ask costs nothing.
	// See docs/design/facts.md#gce-metadata-waits.
	absent time.Duration
	// away is the longest pause while the server gives no usable answer.
	away time.Duration
}

var attributePace = pace{held: time.Minute, patience: 20 * time.Second,
	absent: watchPoll, away: 30 * time.Second}

// watchPoll is how often the attribute is asked for where the server cannot wait for it.
const watchPoll = 5 * time.Second

// follow tells each answer about a key, news or not, until ctx ends. One lost answer of a long poll
// is no news, and is not told: the next one says whether the server is really away.
func follow(ctx context.Context, path string, p pace, tell func(text []byte, err error)) {
	first, etag, wait, last := true, "", time.Duration(0), ""
	for ctx.Err() == nil {
		began := time.Now()
		text, newETag, err := get(ctx, path, etag, p)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			tell(text, nil)
			wait = 0
			// A server that cannot wait, or does not though it gives an ETag: poll.
			if newETag == "" || newETag == "0" ||
				etag != "" && string(text) == last && time.Since(began) < p.held/2 {
				wait = p.absent
			}
			etag, first, last = newETag, false, string(text)
		case isMissing(err):
			tell(nil, err)
			etag, wait, first = "", p.absent, false
		default:
			if wait > 0 || first {
				tell(nil, err)
				first = false
			}
			etag, wait = "", min(max(2*wait, time.Second), p.away)
		}
		if !sleep(ctx, wait) {
			return
		}
	}
}

// isMissing says that the server has answered that there is no such key.
func isMissing(err error) bool {
	var status *Error
	return errors.Is(err, ErrNoAttribute) ||
		errors.As(err, &status) && status.Code == http.StatusNotFound
}

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
