package metadata

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	gce "cloud.google.com/go/compute/metadata"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
)

// Error is a metadata server's answer other than 200, or none at all.
type Error struct {
	Path string
	Code int // 0: no answer
	Err  error
}

func (e *Error) Error() string {
	if e.Code != 0 {
		return fmt.Sprintf("read %q from the metadata server: status %d %s", e.Path, e.Code,
			http.StatusText(e.Code))
	}
	return fmt.Sprintf("read %q from the metadata server: %v", e.Path, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// Read asks for path, relative to computeMetadata/v1/. What may pass (5xx, 429, a refused
// connection) is tried again five times within 3 s. Errors: [*Error].
func Read(ctx context.Context, path string) ([]byte, error) {
	text, _, err := get(ctx, path, "", pace{})
	return text, err
}

// Account is the VM's service account, with which Envoy presents itself to the control plane. It
// cannot change while the VM runs.
type Account struct {
	Email  string   // "": the VM has none
	Scopes []string // URLs
}

// ReadAccount asks for the VM's service account. Errors: [*Error].
func ReadAccount(ctx context.Context) (Account, error) {
	const path = "instance/service-accounts/default/"
	email, err := Read(ctx, path+"email")
	var status *Error
	if errors.As(err, &status) && status.Code == http.StatusNotFound {
		return Account{}, nil
	}
	if err != nil {
		return Account{}, err
	}
	scopes, err := Read(ctx, path+"scopes")
	if err != nil {
		return Account{}, err
	}
	return Account{
		Email:  strings.TrimSpace(string(email)),
		Scopes: strings.Fields(string(scopes)),
	}, nil
}

// ReadInstance asks for the VM's id, which no other VM has or will have; "": the server has none.
// It is a number: by another one the VM's state is thrown away, by a page of somebody's in between
// it is not. Errors: [*Error].
func ReadInstance(ctx context.Context) (string, error) {
	const path = "instance/id"
	text, err := Read(ctx, path)
	if err != nil {
		return "", err
	}
	id := strings.TrimSpace(string(text))
	if _, err := strconv.ParseUint(id, 10, 64); err != nil && id != "" {
		return "", &Error{Path: path, Err: fmt.Errorf("%.40q is no instance's id", id)}
	}
	return id, nil
}

// direct never goes through a proxy: HTTPS_PROXY is for downloads, and the metadata server refuses
// proxied requests.
var direct = &http.Transport{
	DialContext:           (&net.Dialer{Timeout: 3 * time.Second}).DialContext,
	ResponseHeaderTimeout: 70 * time.Second, // longer than a long poll
	IdleConnTimeout:       90 * time.Second,
}

// answer notes what gce.Client does not hand on of an answer, and bounds what it reads.
type answer struct {
	etag  string
	ahead time.Duration // this machine's clock, against the server's
	dated bool          // that is known
}

func (a *answer) RoundTrip(req *http.Request) (*http.Response, error) {
	sent := time.Now()
	resp, err := Transport{Base: direct}.RoundTrip(req)
	if err == nil {
		a.etag = resp.Header.Get("ETag")
		a.ahead, a.dated = offset(sent, time.Now(), resp.Header.Get("Date"))
		// One more than allowed: Parse says that it is too long.
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, attribute.MaxSize+1), resp.Body}
	}
	return resp, err
}

// get is Read. With an etag it waits for another value, for as long as the pace says.
func get(ctx context.Context, path, etag string, p pace) (text []byte, newETag string, err error) {
	answer := &answer{}
	text, err = ask(ctx, path, etag, p, answer)
	return text, answer.etag, err
}

func ask(ctx context.Context, path, etag string, p pace, answer *answer) (text []byte, err error) {
	if err := CheckHost(); err != nil {
		return nil, &Error{Path: path, Err: err}
	}
	limit := 10 * time.Second
	query := ""
	if etag != "" {
		limit = p.held + p.patience
		query = "?" + url.Values{
			"wait_for_change": {"true"}, "last_etag": {etag},
			"timeout_sec": {strconv.Itoa(int(p.held / time.Second))},
		}.Encode()
	}
	outer := ctx
	ctx, cancel := context.WithTimeout(outer, limit)
	defer cancel()
	client := gce.NewClient(&http.Client{
		Transport:     answer,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	})
	value, err := client.GetWithContext(ctx, path+query)
	var (
		missing gce.NotDefinedError
		status  *gce.Error
		urlErr  *url.Error
	)
	switch {
	case err == nil:
		return []byte(value), nil
	case errors.As(err, &missing) && path == attributePath:
		return nil, ErrNoAttribute
	case errors.As(err, &missing):
		return nil, &Error{Path: path, Code: http.StatusNotFound, Err: err}
	case errors.As(err, &status):
		return nil, &Error{Path: path, Code: status.Code, Err: err}
	case errors.Is(err, context.DeadlineExceeded) && outer.Err() != nil:
		err = fmt.Errorf("no answer in time: %w", outer.Err())
	case errors.Is(err, context.DeadlineExceeded):
		err = fmt.Errorf("no answer within %v", limit)
	case errors.As(err, &urlErr):
		err = urlErr.Err // the address is said by Error
	}
	return nil, &Error{Path: path, Err: err}
}
