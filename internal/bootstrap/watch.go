package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"cloud.google.com/go/compute/metadata"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	metadatahost "github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
)

// attributePath is the attribute's, relative to computeMetadata/v1/.
const attributePath = "instance/attributes/" + attribute.Name

// ErrNoAttribute is the error of a VM without the gce-service-proxy attribute.
var ErrNoAttribute = fmt.Errorf("%w; create its template with gcloud compute instance-templates create --service-proxy enabled", attribute.ErrMissing)

// MetadataError is a metadata server's answer other than 200 and 404, or none at all.
type MetadataError struct {
	Path string
	Code int // 0: no answer
	Err  error
}

func (e *MetadataError) Error() string {
	if e.Code != 0 {
		return fmt.Sprintf("read %q from the metadata server: status %d %s", e.Path, e.Code, http.StatusText(e.Code))
	}
	return fmt.Sprintf("read %q from the metadata server: %v", e.Path, e.Err)
}

func (e *MetadataError) Unwrap() error { return e.Err }

// Attribute is one look at the attribute: Config when Err is nil, else Err: ErrNoAttribute, attribute.ErrAnthos, an
// *attribute.KeyError or a *MetadataError. Text is the attribute's text as far as it was read.
type Attribute struct {
	Config attribute.Config
	Text   []byte
	Err    error
}

// WatchAttribute calls emit with the attribute as it is, and again whenever it or the way it cannot be read has changed,
// until ctx ends. An error never repeats, so that emit may log it. What to make of an error is up to the caller: the daemon
// keeps the last good Config.
//
// It polls by itself, because metadata.Client.SubscribeWithContext returns when the key is missing, sends no timeout_sec
// and sleeps deaf to its context.
func WatchAttribute(ctx context.Context, emit func(Attribute)) {
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
		text, newETag, err := getMetadata(ctx, attributePath, etag)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			a := Attribute{Text: text}
			a.Config, a.Err = attribute.Parse(text)
			say(a)
			wait = 0
			if newETag == "" || newETag == "0" { // a server that cannot wait: poll
				wait = watchPoll
			}
			etag = newETag
		case errors.Is(err, ErrNoAttribute):
			say(Attribute{Err: err})
			etag, wait = "", watchPoll // a missing key answers at once, even with wait_for_change
		default:
			// One lost answer of a long poll is no news: the next one says whether the server is really away.
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

// watchPoll is how often a key is asked for that the server cannot wait for. The server is on the host: an ask costs nothing.
const watchPoll = 5 * time.Second

// ReadAttribute reads and parses the attribute once.
func ReadAttribute(ctx context.Context) Attribute {
	text, _, err := getMetadata(ctx, attributePath, "")
	if err != nil {
		return Attribute{Err: err}
	}
	a := Attribute{Text: text}
	a.Config, a.Err = attribute.Parse(text)
	return a
}

// Account is the VM's service account, with which Envoy presents itself to the control plane. It cannot change while the VM runs.
type Account struct {
	Email  string   // "": the VM has none
	Scopes []string // URLs
}

// ReadAccount asks the metadata server for the VM's service account. Errors: *MetadataError.
func ReadAccount(ctx context.Context) (Account, error) {
	const path = "instance/service-accounts/default/"
	email, _, err := getMetadata(ctx, path+"email", "")
	var status *MetadataError
	if errors.As(err, &status) && status.Code == http.StatusNotFound {
		return Account{}, nil
	}
	if err != nil {
		return Account{}, err
	}
	scopes, _, err := getMetadata(ctx, path+"scopes", "")
	if err != nil {
		return Account{}, err
	}
	return Account{Email: strings.TrimSpace(string(email)), Scopes: strings.Fields(string(scopes))}, nil
}

// ReadInstance asks the metadata server for the VM's id, which no other VM has or will have. Errors: *MetadataError.
func ReadInstance(ctx context.Context) (string, error) {
	id, _, err := getMetadata(ctx, "instance/id", "")
	return strings.TrimSpace(string(id)), err
}

// metadataTransport never goes through a proxy: HTTPS_PROXY is for downloads, and the metadata server refuses proxied requests.
var metadataTransport = &http.Transport{
	DialContext:           (&net.Dialer{Timeout: 3 * time.Second}).DialContext,
	ResponseHeaderTimeout: 70 * time.Second, // longer than a long poll
	IdleConnTimeout:       90 * time.Second,
}

// metadataAnswer notes what metadata.Client does not hand on of an answer, its ETag, and bounds what it reads.
type metadataAnswer struct{ etag string }

func (a *metadataAnswer) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := metadatahost.Transport{Base: metadataTransport}.RoundTrip(req)
	if err == nil {
		a.etag = resp.Header.Get("ETag")
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, attribute.MaxSize+1), resp.Body} // one more: Parse says that it is too long
	}
	return resp, err
}

// getMetadata reads path, relative to computeMetadata/v1/. With an etag it waits up to a minute for another value. What
// may pass (5xx, 429, a refused connection) is tried again five times within 3 s.
func getMetadata(ctx context.Context, path, etag string) (text []byte, newETag string, err error) {
	if err := metadatahost.CheckHost(); err != nil {
		return nil, "", &MetadataError{Path: path, Err: err}
	}
	limit := 10 * time.Second
	query := ""
	if etag != "" {
		limit = 80 * time.Second
		query = "?" + url.Values{"wait_for_change": {"true"}, "timeout_sec": {"60"}, "last_etag": {etag}}.Encode()
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	answer := &metadataAnswer{}
	client := metadata.NewClient(&http.Client{
		Transport:     answer,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	})
	value, err := client.GetWithContext(ctx, path+query)
	var (
		missing metadata.NotDefinedError
		status  *metadata.Error
		urlErr  *url.Error
	)
	switch {
	case err == nil:
		return []byte(value), answer.etag, nil
	case errors.As(err, &missing) && path == attributePath:
		return nil, "", ErrNoAttribute
	case errors.As(err, &missing):
		return nil, "", &MetadataError{Path: path, Code: http.StatusNotFound, Err: err}
	case errors.As(err, &status):
		return nil, "", &MetadataError{Path: path, Code: status.Code, Err: err}
	case errors.Is(err, context.DeadlineExceeded):
		err = fmt.Errorf("no answer within %v", limit)
	case errors.As(err, &urlErr):
		err = urlErr.Err // the address is said by MetadataError
	}
	return nil, "", &MetadataError{Path: path, Err: err}
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
