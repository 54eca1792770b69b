package webconfig

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// Guard lets those through to h whom the file lets in, by what is in force when they ask. Others
// are answered 401, 429 above the file's rate limit, or 503 while too many try passwords; so is
// everybody until a file was loaded. caller is for whom a request counts, by its remote address.
func (f *File) Guard(h http.Handler, caller func(netip.Addr) netip.Prefix) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		good := f.good.Load()
		if good == nil {
			refuse(w, http.StatusServiceUnavailable)
			return
		}
		if good.limiter != nil && !good.limiter.Allow() {
			refuse(w, http.StatusTooManyRequests)
			return
		}
		for name, value := range good.config.HTTP.Headers {
			w.Header().Set(name, value)
		}
		if users := good.config.Users; len(users) > 0 {
			name, password, given := r.BasicAuth()
			from, _ := netip.ParseAddrPort(r.RemoteAddr)
			what := wrong
			if given {
				what = f.passwords.check(r.Context(), users, name, password, caller(from.Addr()))
			}
			switch what {
			case wrong:
				w.Header().Set("WWW-Authenticate", "Basic")
				refuse(w, http.StatusUnauthorized)
				return
			case busy:
				w.Header().Set("Retry-After", "1")
				refuse(w, http.StatusServiceUnavailable)
				return
			}
		}
		h.ServeHTTP(w, r)
	})
}

func refuse(w http.ResponseWriter, code int) { http.Error(w, http.StatusText(code), code) }

// verdict is what is known of a password.
type verdict int

const (
	wrong verdict = iota
	right
	busy // too many try: not looked at
)

// turnWait bounds how long a caller waits for others' passwords. A scrape usually has 10 s.
const turnWait = 5 * time.Second

// wrongPause is how many times as long as a wrong password took no other one is looked at: so they
// cost a tenth of one processor at the most, whatever cost the hashes have.
const wrongPause = 9

// passwords compares passwords with their hashes: one at a time, since each takes up to a second of
// a processor. A right one is known from then on, so that those who have it do not wait for those
// who guess. One caller waits once: who guesses over many connections takes one place in the queue.
type passwords struct {
	compare func(hash, password []byte) error // bcrypt's
	key     [32]byte                          // of the digests: no password is kept
	turn    chan struct{}                     // has one token while no password is looked at

	mu      sync.Mutex
	known   map[string][]byte // by user, the digest of the password that was right, and its hash
	waiting map[netip.Prefix]bool
}

func newPasswords() *passwords {
	p := &passwords{compare: bcrypt.CompareHashAndPassword, turn: make(chan struct{}, 1),
		known: map[string][]byte{}, waiting: map[netip.Prefix]bool{}}
	_, _ = rand.Read(p.key[:]) // it never fails
	p.turn <- struct{}{}
	return p
}

func (p *passwords) check(ctx context.Context, users map[string]hash, name, password string,
	from netip.Prefix) verdict {
	of, there := users[name]
	digest := p.digest(of, password)
	p.mu.Lock()
	known := there && hmac.Equal(digest, p.known[name])
	queued := p.waiting[from]
	if !known && !queued {
		p.waiting[from] = true
	}
	p.mu.Unlock()
	switch {
	case known:
		return right
	case queued:
		return busy
	}
	defer func() {
		p.mu.Lock()
		delete(p.waiting, from)
		p.mu.Unlock()
	}()
	ctx, cancel := context.WithTimeout(ctx, turnWait)
	defer cancel()
	select {
	case <-p.turn:
	case <-ctx.Done():
		return busy
	}
	if !there {
		// The same work as for a name that is there, or the time would tell which are.
		of = users[slices.Min(slices.Collect(maps.Keys(users)))]
	}
	began := time.Now()
	err := p.compare([]byte(of), []byte(password))
	if err != nil || !there {
		time.AfterFunc(wrongPause*time.Since(began), func() { p.turn <- struct{}{} })
		return wrong
	}
	p.turn <- struct{}{}
	p.mu.Lock()
	p.known[name] = digest
	p.mu.Unlock()
	return right
}

func (p *passwords) digest(of hash, password string) []byte {
	d := hmac.New(sha256.New, p.key[:])
	_ = binary.Write(d, binary.BigEndian, uint64(len(of))) // a hash takes everything
	d.Write([]byte(of))
	d.Write([]byte(password))
	return d.Sum(nil)
}
