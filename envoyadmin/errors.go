package envoyadmin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"

	"github.com/go-json-experiment/json/jsontext"
)

// What can go wrong with an answer of Envoy, each told apart by errors.Is. Every error of a Client
// wraps exactly one of them, or the caller's own context error.
var (
	// connection refused, or no such socket file
	ErrRefused = errors.New("nothing listens on the admin address")
	// connecting, waiting for or reading the answer
	ErrTimeout = errors.New("the admin interface did not answer in time")
	// Trust said no; its own error is wrapped too
	ErrUntrusted = errors.New("the admin address belongs to someone else")
	ErrStatus    = errors.New("the admin interface answered with an error") // see StatusError
	// 403: admin.allow_paths of Envoy 1.37 and later
	ErrForbiddenPath = errors.New("the admin interface forbids this path")
	// never followed: Envoy does not redirect
	ErrRedirect = errors.New("the admin interface redirects")
	// Content-Encoding: gzip and the like
	ErrEncoding = errors.New("the answer is encoded, which was not asked for")
	ErrEmpty    = errors.New("the answer is empty")
	// HTML, another service, JSON of another shape
	ErrNotJSON   = errors.New("the answer is not what Envoy answers")
	ErrTruncated = errors.New("the answer ends too early")
	ErrTooLarge  = errors.New("the answer is too large") // in all, or one value in it
	ErrTooDeep   = errors.New("the answer is nested too deeply")
	// anything else on the way: reset, no route, no permission
	ErrConnection = errors.New("the connection to the admin interface failed")
)

// StatusError says which HTTP status came instead of 200. It matches ErrStatus, and
// ErrForbiddenPath with code 403.
type StatusError struct {
	Code int
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("status %d %s", e.Code, http.StatusText(e.Code))
}

// Is makes errors.Is(err, ErrStatus) true, and errors.Is(err, ErrForbiddenPath) for 403.
func (e *StatusError) Is(target error) bool {
	return target == ErrStatus || target == ErrForbiddenPath && e.Code == http.StatusForbidden
}

// BadAddressError says why an admin address cannot be used.
type BadAddressError struct {
	Addr, Reason string
}

func (e *BadAddressError) Error() string {
	return fmt.Sprintf("admin address %q: %s", e.Addr, e.Reason)
}

// classify puts a kind to what net/http, the socket or the JSON reader said. ctx is the caller's:
// when it was cancelled, that is the reason. limited has our time limit too: when it ends, net/http
// closes the connection, and reading says just that.
func classify(ctx, limited context.Context, err error) error {
	if cause := ctx.Err(); errors.Is(cause, context.Canceled) {
		return cause
	}
	var status *StatusError
	if errors.As(err, &status) || hasKind(err) {
		return err
	}
	var timeout net.Error
	var syntax *jsontext.SyntacticError
	kind := ErrConnection
	switch {
	case errors.As(err, &syntax) && !errors.Is(err, io.ErrUnexpectedEOF):
		kind = ErrNotJSON
	case errors.Is(limited.Err(), context.DeadlineExceeded), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		kind = ErrTimeout
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		kind = ErrRefused
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		kind = ErrTruncated
	}
	return fmt.Errorf("%w: %w", kind, err)
}

func hasKind(err error) bool {
	for _, kind := range []error{ErrUntrusted, ErrRedirect, ErrEncoding, ErrEmpty, ErrNotJSON,
		ErrTruncated, ErrTooLarge, ErrTooDeep} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}
