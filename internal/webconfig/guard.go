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

// failedFor is how long a caller is one who guesses, after a wrong password.
const failedFor = time.Minute

// passwords compares passwords with their hashes: one at a time, since each takes up to a second of
// a processor. A right one is known from then on, so that those who have it do not wait for those
// who guess. One caller waits once: who guesses over many connections takes one place in the queue.
// Who has just guessed wrong waits behind all who have not: or a few addresses of them would keep a
// scraper out whose password is not known yet.
type passwords struct {
	compare func(hash, password []byte) error // bcrypt's
	key     [32]byte                          // of the digests: no password is kept

	mu      sync.Mutex
	looking bool               // at a password, or pausing after a wrong one
	queues  [2][]chan struct{} // who waits for that to end: those who have not guessed, those who have
	known   map[string][]byte  // by user, the digest of the password that was right, and its hash
	waiting map[netip.Prefix]bool
	failed  map[netip.Prefix]time.Time // when a caller's last wrong password was
}

func newPasswords() *passwords {
	p := &passwords{compare: bcrypt.CompareHashAndPassword,
		known: map[string][]byte{}, waiting: map[netip.Prefix]bool{},
		failed: map[netip.Prefix]time.Time{}}
	_, _ = rand.Read(p.key[:]) // it never fails
	return p
}

func (p *passwords) check(ctx context.Context, users map[string]hash, name, password string,
	from netip.Prefix) verdict {
	of, there := users[name]
	digest := p.digest(of, password)
	p.mu.Lock()
	known := there && hmac.Equal(digest, p.known[name])
	queued := p.waiting[from]
	at, failed := p.failed[from]
	guesses := failed && time.Since(at) < failedFor
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
	if !p.take(ctx, guesses) {
		return busy
	}
	if !there {
		// The same work as for a name that is there, or the time would tell which are.
		of = users[slices.Min(slices.Collect(maps.Keys(users)))]
	}
	began := time.Now()
	err := p.compare([]byte(of), []byte(password))
	if err != nil || !there {
		time.AfterFunc(wrongPause*time.Since(began), p.give)
		p.mu.Lock()
		maps.DeleteFunc(p.failed, func(_ netip.Prefix, at time.Time) bool {
			return time.Since(at) >= failedFor
		})
		p.failed[from] = time.Now()
		p.mu.Unlock()
		return wrong
	}
	p.give()
	p.mu.Lock()
	p.known[name] = digest
	p.mu.Unlock()
	return right
}

// take waits for the turn to look at a password, and says whether it came. Who has it calls give.
func (p *passwords) take(ctx context.Context, guesses bool) bool {
	p.mu.Lock()
	if !p.looking {
		p.looking = true
		p.mu.Unlock()
		return true
	}
	queue := &p.queues[map[bool]int{true: 1}[guesses]]
	turn := make(chan struct{})
	*queue = append(*queue, turn)
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, turnWait)
	defer cancel()
	select {
	case <-turn:
		return true
	case <-ctx.Done():
	}
	p.mu.Lock()
	at := slices.Index(*queue, turn)
	if at >= 0 {
		*queue = slices.Delete(*queue, at, at+1)
	}
	p.mu.Unlock()
	return at < 0 // it came at the last moment
}

func (p *passwords) give() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, queue := range p.queues {
		if len(queue) > 0 {
			p.queues[i] = queue[1:]
			close(queue[0])
			return
		}
	}
	p.looking = false
}

func (p *passwords) digest(of hash, password string) []byte {
	d := hmac.New(sha256.New, p.key[:])
	_ = binary.Write(d, binary.BigEndian, uint64(len(of))) // a hash takes everything
	d.Write([]byte(of))
	d.Write([]byte(password))
	return d.Sum(nil)
}
