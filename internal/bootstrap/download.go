package bootstrap

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
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

	"github.com/service-proxy-agent/service-proxy-agent/internal/authorities"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/redaction"
	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
)

// maxArchive is the most bytes of an archive that are downloaded; Envoy's are 30 to 60 MB.
const maxArchive = 512 << 20

// maxSumFile is as much as is read of URL.sha256: its first word is 64 bytes.
const maxSumFile = 4096

// connectLimit is how long a connection may take, and its handshake as long again.
var connectLimit = 10 * time.Second

// stallLimit ends a download that sends nothing for so long. There is no limit on the whole: slow
// is not dead.
var stallLimit = 30 * time.Second

// retryPauses are waited before a download that failed for a reason that may pass is tried again.
var retryPauses = []time.Duration{time.Second, 2 * time.Second, 4 * time.Second}

// downloadError is a source that gave no archive. Its text never holds a URL's query or user, which
// may be secrets.
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
	errURL       = errors.New("malformed URL")
	errSumWanted = errors.New("want #sha256= and 64 hex digits behind the URL")
	errSumFile   = errors.New("its .sha256 does not start with 64 hex digits")
	errChecksum  = errors.New("wrong checksum")
	errLarge     = errors.New("larger than")
	errScheme    = errors.New("is none of gs, https, file")
	errRedirect  = errors.New("redirected away from https, or more than 5 times")
	errNoAccount = errors.New("the VM has no service account to read Cloud Storage with")
)

// permanentErrors are what somebody must mend.
var permanentErrors = []error{
	errURL, errSumWanted, errSumFile, errChecksum, errLarge, errScheme, errRedirect, errNoAccount,
	fs.ErrNotExist, untrusted.ErrNotRegular,
}

// isPermanent says of a download's error that somebody must mend it. Of a status, 408, 429 and all
// of 5xx may pass (https://cloud.google.com/storage/docs/retry-strategy), and so may whatever the
// network does.
func isPermanent(err error) bool {
	for _, permanent := range permanentErrors {
		if errors.Is(err, permanent) {
			return true
		}
	}
	var status *statusError
	return errors.As(err, &status) && status.code/100 == 4 &&
		status.code != http.StatusRequestTimeout && status.code != http.StatusTooManyRequests
}

// redact is the URL without user, query and fragment.
func redact(source string) string {
	u, err := url.Parse(source)
	if err != nil {
		return "(malformed URL)"
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).Redacted()
}

// download gets source, a gs://, https:// or file:// URL, into the file into, and tries again where
// that may help.
func (b *bootstrapper) download(ctx context.Context, source string, into *os.File) error {
	for _, pause := range retryPauses {
		err := b.downloadOnce(ctx, source, into)
		var failed *downloadError
		var disk *fs.PathError
		if !errors.As(err, &failed) || failed.permanent || errors.As(err, &disk) {
			return err
		}
		b.Log.Info("a download is tried again", zap.Error(err), zap.Duration("pause", pause))
		// A fleet that was started at once does not come back at once.
		if !sleep(ctx, pause+rand.N(pause/4)) {
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

// downloadOnce streams source into the file into, and checks it. Errors: *downloadError.
func (b *bootstrapper) downloadOnce(ctx context.Context, source string, into *os.File) error {
	u, err := url.Parse(source)
	if err != nil {
		err = errURL // the parser's words hold the URL
	} else {
		err = b.fetch(ctx, u, into)
	}
	if err != nil {
		return &downloadError{redact(source), err, isPermanent(err)}
	}
	return nil
}

// fetch streams the URL into the file into, which is at its start again afterwards.
func (b *bootstrapper) fetch(ctx context.Context, u *url.URL, into *os.File) error {
	want, err := b.wantedSum(ctx, u)
	if err != nil {
		return err
	}
	plain := *u
	plain.Fragment = ""
	body, err := b.open(ctx, &plain)
	if err != nil {
		return err
	}
	defer body.Close()
	have, err := receive(into, body, maxArchive)
	if err != nil {
		return err
	}
	if want != "" && have != want {
		return fmt.Errorf("%w: sha256 %s, want %s", errChecksum, have, want)
	}
	return seekStart(into)
}

// receive copies an archive of at most limit bytes, and returns its SHA-256 in hex.
func receive(into io.Writer, archive io.Reader, limit int64) (sum string, err error) {
	hash := sha256.New()
	n, err := io.Copy(io.MultiWriter(into, hash), io.LimitReader(archive, limit+1))
	if err != nil {
		return "", err
	}
	if n > limit {
		return "", fmt.Errorf("%w %d MB", errLarge, limit>>20)
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// wantedSum is the SHA-256 that the archive must have, in hex: #sha256=HEX on the URL, else the
// first word of URL.sha256 where that exists, else "".
func (b *bootstrapper) wantedSum(ctx context.Context, u *url.URL) (string, error) {
	if u.Fragment != "" {
		sum, ok := strings.CutPrefix(u.Fragment, "sha256=")
		if !ok || !isSum(sum) {
			return "", errSumWanted
		}
		return strings.ToLower(sum), nil
	}
	beside := *u
	beside.Path += ".sha256"
	beside.RawPath = ""
	body, err := b.open(ctx, &beside)
	if isAbsent(err) {
		return "", nil // nothing to check against
	}
	if err != nil {
		return "", fmt.Errorf("read its .sha256: %w", err)
	}
	defer body.Close()
	text, err := io.ReadAll(io.LimitReader(body, maxSumFile))
	if err != nil {
		return "", fmt.Errorf("read its .sha256: %w", err)
	}
	sum, _, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
	if !isSum(sum) {
		return "", errSumFile
	}
	return strings.ToLower(sum), nil
}

// isSum says that the text is a SHA-256 in hex.
func isSum(text string) bool {
	sum, err := hex.DecodeString(text)
	return err == nil && len(sum) == sha256.Size
}

type statusError struct {
	code int
	hint string
}

func (e *statusError) Error() string {
	return fmt.Sprintf("status %d %s%s", e.code, http.StatusText(e.code), e.hint)
}

// isAbsent says that there is no such object. Cloud Storage answers 403 for one to a reader who may
// not list the bucket.
func isAbsent(err error) bool {
	var status *statusError
	return errors.Is(err, fs.ErrNotExist) ||
		errors.As(err, &status) &&
			(status.code == http.StatusNotFound || status.code == http.StatusForbidden)
}

// cloudStorage is the host of Cloud Storage's XML API, where an object is /BUCKET/OBJECT.
const cloudStorage = "storage.googleapis.com"

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
		object := &url.URL{Scheme: "https", Host: b.storage, Path: "/" + u.Host + u.Path}
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

// get asks an https server; the token may be "".
func (b *bootstrapper) get(ctx context.Context, u *url.URL, token string) (io.ReadCloser, error) {
	client, err := b.client()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		cancel(nil)
		return nil, errURL
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
		return nil, &statusError{resp.StatusCode, statusHint(resp.StatusCode, token != "")}
	}
	stalled := time.AfterFunc(stallLimit, func() {
		cancel(fmt.Errorf("nothing received for %v", stallLimit))
	})
	return &stallReader{ReadCloser: resp.Body, ctx: ctx, timer: stalled, cancel: cancel}, nil
}

// statusHint is what to do about a status, as the end of its sentence.
func statusHint(code int, withToken bool) string {
	switch refused := code == http.StatusForbidden || code == http.StatusUnauthorized; {
	case refused && withToken:
		return ": grant the VM's service account roles/storage.objectViewer on the bucket"
	case refused:
		return ": it is not public, or not there; " +
			"a private object of Cloud Storage is gs://BUCKET/OBJECT"
	}
	return ""
}

// client trusts the VM's authorities. They are read anew: ca-certificates may have been installed
// by this very run.
func (b *bootstrapper) client() (*http.Client, error) {
	pool, err := authorities.Pool(b.Root)
	if err != nil {
		return nil, err
	}
	return &http.Client{
		Transport: &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           (&net.Dialer{Timeout: connectLimit}).DialContext,
			TLSHandshakeTimeout:   connectLimit,
			ResponseHeaderTimeout: stallLimit,
			TLSClientConfig:       &tls.Config{RootCAs: pool},
			// An archive is what was stored, and its checksum is of that.
			DisableCompression: true,
			ForceAttemptHTTP2:  true,
		},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if req.URL.Scheme != "https" || len(via) > 5 {
				return errRedirect
			}
			return nil
		},
	}, nil
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
	// An end of file counts for nothing then: a server that is told of the connection's end may
	// finish its answer before it is gone.
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
