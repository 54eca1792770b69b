package bootstrap

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/redaction"
	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
)

// maxArchive is the most bytes of an archive that are downloaded; Envoy's are 30 to 60 MB.
const maxArchive = 512 << 20

// stallLimit ends a download that sends nothing for so long. There is no limit on the whole: slow is not dead.
var stallLimit = 30 * time.Second

// retryPauses are waited before a download that failed for a reason that may pass is tried again.
var retryPauses = []time.Duration{time.Second, 2 * time.Second, 4 * time.Second}

// downloadError is a source that gave no archive. Its text never holds a URL's query or user, which may be secrets.
type downloadError struct {
	source    string // redacted
	err       error
	permanent bool
}

func (e *downloadError) Error() string {
	return fmt.Sprintf("download %s: %s", e.source, redaction.Text(e.err.Error()))
}
func (e *downloadError) Unwrap() error { return e.err }

var (
	errChecksum  = errors.New("wrong checksum")
	errScheme    = errors.New("is none of gs, https, file")
	errRedirect  = errors.New("redirected away from https, or more than 5 times")
	errNoAccount = errors.New("the VM has no service account to read Cloud Storage with")
)

// isPermanent says of an error of open that somebody must mend it. Of a status, 408, 429 and all of
// 5xx may pass (https://cloud.google.com/storage/docs/retry-strategy), and so may whatever the
// network does.
func isPermanent(err error) bool {
	for _, permanent := range []error{fs.ErrNotExist, untrusted.ErrNotRegular, errScheme, errRedirect, errNoAccount} {
		if errors.Is(err, permanent) {
			return true
		}
	}
	var status *statusError
	return errors.As(err, &status) && status.code/100 == 4 && status.code != http.StatusRequestTimeout && status.code != http.StatusTooManyRequests
}

// redact is the URL without user, query and fragment.
func redact(source string) string {
	u, err := url.Parse(source)
	if err != nil {
		return "(malformed URL)"
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).Redacted()
}

// download gets source into the file into, and tries again where that may help.
func (b *bootstrapper) download(ctx context.Context, source string, into *os.File) error {
	for _, pause := range retryPauses {
		err := b.downloadOnce(ctx, source, into)
		var failed *downloadError
		var disk *fs.PathError
		if !errors.As(err, &failed) || failed.permanent || errors.As(err, &disk) {
			return err
		}
		b.Log.Info("a download is tried again", zap.Error(err), zap.Duration("pause", pause))
		if !sleep(ctx, pause+rand.N(pause/4)) { // a fleet that was started at once does not come back at once
			return err
		}
		if err := errors.Join(into.Truncate(0), seekStart(into)); err != nil {
			return err
		}
	}
	return b.downloadOnce(ctx, source, into)
}

func seekStart(f *os.File) error {
	_, err := f.Seek(0, io.SeekStart)
	return err
}

// downloadOnce streams source, a gs://, https:// or file:// URL, into the file into, and checks it
// against #sha256=HEX on the URL, else against the first word of URL.sha256 where that exists.
func (b *bootstrapper) downloadOnce(ctx context.Context, source string, into *os.File) error {
	fail := func(err error, permanent bool) error { return &downloadError{redact(source), err, permanent} }
	u, err := url.Parse(source)
	if err != nil {
		return fail(errors.New("malformed URL"), true)
	}
	want := ""
	if u.Fragment != "" {
		hexSum, ok := strings.CutPrefix(u.Fragment, "sha256=")
		if _, err := hex.DecodeString(hexSum); !ok || err != nil || len(hexSum) != 64 {
			return fail(errors.New("want #sha256= and 64 hex digits behind the URL"), true)
		}
		want = strings.ToLower(hexSum)
		u.Fragment = ""
	}
	var sum strings.Builder
	if want == "" {
		beside := *u
		beside.Path += ".sha256"
		beside.RawPath = ""
		body, err := b.open(ctx, &beside)
		switch {
		case err == nil:
			_, err = io.Copy(&sum, io.LimitReader(body, 4096))
			body.Close()
			if err != nil {
				return fail(fmt.Errorf("read its .sha256: %w", err), false)
			}
			want, _, _ = strings.Cut(strings.TrimSpace(sum.String()), " ")
			want = strings.ToLower(want)
			if _, err := hex.DecodeString(want); err != nil || len(want) != 64 {
				return fail(errors.New("its .sha256 does not start with 64 hex digits"), true)
			}
		case isAbsent(err): // nothing to check against
		default:
			return fail(fmt.Errorf("read its .sha256: %w", err), isPermanent(err))
		}
	}
	body, err := b.open(ctx, u)
	if err != nil {
		return fail(err, isPermanent(err))
	}
	defer body.Close()
	hash := sha256.New()
	n, err := io.Copy(io.MultiWriter(into, hash), io.LimitReader(body, maxArchive+1))
	switch {
	case err != nil:
		return fail(err, false)
	case n > maxArchive:
		return fail(fmt.Errorf("larger than %d MB", maxArchive>>20), true)
	}
	if have := hex.EncodeToString(hash.Sum(nil)); want != "" && have != want {
		return fail(fmt.Errorf("%w: sha256 %s, want %s", errChecksum, have, want), true)
	}
	if err := seekStart(into); err != nil {
		return fail(err, false)
	}
	return nil
}

type statusError struct {
	code int
	hint string
}

func (e *statusError) Error() string {
	return fmt.Sprintf("status %d %s%s", e.code, http.StatusText(e.code), e.hint)
}

// isAbsent says that there is no such object. Cloud Storage answers 403 for one to a reader who may not list the bucket.
func isAbsent(err error) bool {
	var status *statusError
	return errors.Is(err, fs.ErrNotExist) ||
		errors.As(err, &status) && (status.code == http.StatusNotFound || status.code == http.StatusForbidden)
}

// open starts to read a URL.
func (b *bootstrapper) open(ctx context.Context, u *url.URL) (io.ReadCloser, error) {
	switch u.Scheme {
	case "file":
		return untrusted.OpenRegular(u.Path)
	case "gs":
		token, err := accessToken(ctx)
		if err != nil {
			return nil, err
		}
		object := &url.URL{Scheme: "https", Host: "storage.googleapis.com", Path: "/" + u.Host + u.Path}
		return b.get(ctx, object, token)
	case "https":
		return b.get(ctx, u, "")
	}
	return nil, fmt.Errorf("scheme %q %w", u.Scheme, errScheme)
}

// accessToken is the token of the VM's service account.
func accessToken(ctx context.Context) (string, error) {
	text, err := metadata.Read(ctx, "instance/service-accounts/default/token")
	if err != nil {
		var status *metadata.Error
		if errors.As(err, &status) && status.Code == http.StatusNotFound {
			return "", errNoAccount
		}
		return "", err
	}
	var token struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(text, &token); err != nil || token.AccessToken == "" {
		return "", errors.New("the metadata server's token cannot be read")
	}
	return token.AccessToken, nil
}

func (b *bootstrapper) get(ctx context.Context, u *url.URL, token string) (io.ReadCloser, error) {
	// The pool is read anew: ca-certificates may have been installed by this very run, and Go reads the system's once.
	var pool *x509.CertPool
	if ca := b.caFile(); ca != "" {
		pem, err := os.ReadFile(b.path(ca))
		if err != nil {
			return nil, err
		}
		pool = x509.NewCertPool()
		pool.AppendCertsFromPEM(pem)
	}
	transport := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: stallLimit,
		TLSClientConfig:       &tls.Config{RootCAs: pool},
		DisableCompression:    true, // an archive is what was stored, and its checksum is of that
		ForceAttemptHTTP2:     true,
	}
	client := &http.Client{Transport: transport, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if req.URL.Scheme != "https" || len(via) > 5 {
			return errRedirect
		}
		return nil
	}}
	ctx, cancel := context.WithCancelCause(ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		cancel(nil)
		return nil, errors.New("malformed URL")
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := client.Do(req)
	if err != nil {
		cancel(nil)
		var urlErr *url.Error
		if errors.As(err, &urlErr) {
			err = urlErr.Err // without the URL
		}
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		cancel(nil)
		hint := ""
		switch refused := resp.StatusCode == http.StatusForbidden || resp.StatusCode == http.StatusUnauthorized; {
		case refused && token != "":
			hint = ": grant the VM's service account roles/storage.objectViewer on the bucket"
		case refused:
			hint = ": it is not public, or not there; a private object of Cloud Storage is gs://BUCKET/OBJECT"
		}
		return nil, &statusError{resp.StatusCode, hint}
	}
	stalled := time.AfterFunc(stallLimit, func() { cancel(fmt.Errorf("nothing received for %v", stallLimit)) })
	return &stallReader{ReadCloser: resp.Body, ctx: ctx, timer: stalled, cancel: cancel}, nil
}

// stallReader gives up when a Read brings nothing for stallLimit.
type stallReader struct {
	io.ReadCloser
	ctx    context.Context
	timer  *time.Timer
	cancel context.CancelCauseFunc
}

func (r *stallReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if n > 0 {
		r.timer.Reset(stallLimit)
	}
	// An end of file counts for nothing then: a server that is told of the connection's end may finish its answer before it is gone.
	if err != nil && context.Cause(r.ctx) != nil {
		err = context.Cause(r.ctx)
	}
	return n, err
}

func (r *stallReader) Close() error {
	r.timer.Stop()
	r.cancel(nil)
	return r.ReadCloser.Close()
}

// caFiles are where distributions keep the bundle of trusted authorities: Debian and SUSE of today, Red Hat, SUSE of old.
var caFiles = []string{"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"}

// caFile is the VM's bundle, "" where there is none.
func (b *bootstrapper) caFile() string {
	for _, name := range caFiles {
		f, err := os.Open(b.path(name))
		if err != nil {
			continue
		}
		_, err = bufio.NewReader(f).Peek(1) // an interrupted update-ca-certificates can leave it empty
		f.Close()
		if err == nil {
			return name
		}
	}
	return ""
}
