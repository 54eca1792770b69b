package platform

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	metadataPath = "/computeMetadata/v1"
	guestPath    = metadataPath + "/instance/guest-attributes/"
)

// The budget of guest attributes: Compute Engine's documented one for a whole VM ("10
// queries a minute per VM, bursts of 3 a second"), which its own agents share, and what of
// it is this project's.
const (
	BudgetPerMinute = 10
	BudgetPerSecond = 3
	OursPerMinute   = 6
)

// budget counts queries of guest attributes.
type budget struct {
	all, ours  []time.Time
	oursBefore int // the peak of ours, before the last start of the VM
	lost       int
}

func (b *budget) count(now time.Time, path string) {
	b.all = append(b.all, now)
	if strings.HasPrefix(path, guestPath+"gce-service-proxy/") {
		b.ours = append(b.ours, now)
	}
}

// peak is the highest number of queries in any window of that length.
func peak(at []time.Time, window time.Duration) int {
	most, first := 0, 0
	for last := range at {
		for at[last].Sub(at[first]) >= window {
			first++
		}
		most = max(most, last-first+1)
	}
	return most
}

// exceeded says whether the newest query was beyond what the VM has.
func (b *budget) exceeded() bool {
	second, minute := 0, 0
	now := b.all[len(b.all)-1]
	for i := len(b.all) - 1; i >= 0 && now.Sub(b.all[i]) < time.Minute; i-- {
		minute++
		if now.Sub(b.all[i]) < time.Second {
			second++
		}
	}
	return minute > BudgetPerMinute || second > BudgetPerSecond
}

// Budget is how guest attributes were queried: reads, writes, deletions and refused ones alike.
type Budget struct {
	Queries       int
	PeakPerMinute int // most in any 60 s; the budget is BudgetPerMinute
	PeakPerSecond int // most in any second; the budget is BudgetPerSecond
	// most in any 60 s of the namespace gce-service-proxy; the budget is OursPerMinute
	OursPerMinute int
	// writes that were dropped beyond the VM's budget, answered 200: it "might
	// arbitrarily remove" them then
	Lost int
}

// Kept says whether the budget was kept.
func (b Budget) Kept() bool {
	return b.PeakPerMinute <= BudgetPerMinute && b.PeakPerSecond <= BudgetPerSecond &&
		b.OursPerMinute <= OursPerMinute
}

// Budget is how guest attributes were queried since the start or ResetBudget.
func (e *Emulator) Budget() Budget {
	e.mu.Lock()
	defer e.mu.Unlock()
	b := &e.budget
	return Budget{Queries: len(b.all), PeakPerMinute: peak(b.all, time.Minute),
		PeakPerSecond: peak(b.all, time.Second),
		OursPerMinute: max(b.oursBefore, peak(b.ours, time.Minute)), Lost: b.lost}
}

// ResetBudget forgets the queries so far.
func (e *Emulator) ResetBudget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.budget = budget{}
}

// Rebooted says that the VM starts anew: it has forgotten what it spent of its own share, which it
// notes in /run. The VM's budget goes on.
func (e *Emulator) Rebooted() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.budget.oursBefore = max(e.budget.oursBefore, peak(e.budget.ours, time.Minute))
	e.budget.ours = nil
}

// GuestAttributes are the values of a namespace.
func (e *Emulator) GuestAttributes(namespace string) map[string]string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return maps.Clone(e.guest[namespace])
}

// SetGuestAttribute writes as another process on the VM would, outside of the budget.
func (e *Emulator) SetGuestAttribute(namespace, key, value string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.setGuest(namespace, key, value)
}

// DeleteGuestAttribute loses a value, as the platform may.
func (e *Emulator) DeleteGuestAttribute(namespace, key string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.guest[namespace], key)
	e.notify()
}

func (e *Emulator) setGuest(namespace, key, value string) {
	if e.guest[namespace] == nil {
		e.guest[namespace] = make(map[string]string)
	}
	e.guest[namespace][key] = value
	e.notify()
}

// The metadata tree: folders, lists of folders, and leaves (string, []string, bool, int64, uint64).
// Recursive JSON spells a folder's names in camel case, but an attribute's name as it is.
type (
	folder     map[string]any
	attributes map[string]any
	list       []folder
	secret     string // a leaf that recursion leaves out: tokens
)

// tree is the metadata server's content; e.mu is held.
func (e *Emulator) tree() folder {
	v := e.vm
	project := fmt.Sprintf("projects/%d", v.ProjectNumber)
	nic := folder{
		"ip": v.IP, "mac": "42:01:0a:80:00:02", "mtu": int64(1460), "network": project +
			"/networks/" + v.Network,
		"gateway": "10.128.0.1", "subnetmask": "255.255.240.0", "dns-servers": []string{
			"169.254.169.254"},
	}
	// an IPv6-only interface; whether the real server leaves it out or empty is not documented
	if v.IP == "none" {
		delete(nic, "ip")
		delete(nic, "gateway")
		delete(nic, "subnetmask")
	}
	if v.IPv6 != "" {
		nic["ipv6s"] = []string{v.IPv6}
	}
	accounts := folder{}
	if v.ServiceAccount != "none" {
		token, err := json.Marshal(
			map[string]any{"access_token": e.token, "expires_in": 3599, "token_type": "Bearer"})
		if err != nil {
			panic(err) // strings and a number always marshal
		}
		account := folder{"aliases": []string{"default"}, "email": v.ServiceAccount, "scopes": v.Scopes,
			"token": secret(token)}
		accounts["default"], accounts[v.ServiceAccount] = account, account
	}
	attrs, common := attributes{}, attributes{}
	for key, value := range v.Attributes {
		attrs[key] = value
	}
	for key, value := range v.Project.Attributes() {
		common[key] = value
	}
	return folder{
		"instance": folder{
			"attributes":         attrs,
			"cpu-platform":       "Intel Cascade Lake",
			"hostname":           fmt.Sprintf("%s.%s.c.%s.internal", v.Name, v.Zone, v.ProjectID),
			"id":                 v.ID,
			"image":              "projects/debian-cloud/global/images/debian-12-bookworm-v20250101",
			"machine-type":       project + "/machineTypes/e2-medium",
			"maintenance-event":  "NONE",
			"name":               v.Name,
			"network-interfaces": list{nic},
			"service-accounts":   accounts,
			"tags":               []string{},
			"zone":               project + "/zones/" + v.Zone,
		},
		"project": folder{
			"attributes":         common,
			"numeric-project-id": v.ProjectNumber,
			"project-id":         v.ProjectID,
		},
	}
}

// guestTree is instance/guest-attributes/, which is kept out of tree: the recursive answer for the
// instance does not show the values here, so that writing one does not wake those who poll the
// instance. (Whether the real one does so is not known.)
func (e *Emulator) guestTree() attributes {
	out := attributes{}
	for namespace, values := range e.guest {
		in := attributes{}
		for key, value := range values {
			in[key] = value
		}
		out[namespace] = in
	}
	return out
}

var (
	errNotFound = errors.New("not found")
	errRedirect = errors.New("a folder asked for without its slash")
)

// look is what stands at a path below /computeMetadata/v1; a folder's path ends with
// a slash. e.mu is held.
func (e *Emulator) look(path string) (any, error) {
	var at any = e.tree()
	path = strings.TrimPrefix(path, "/")
	if path == "instance/guest-attributes" {
		return nil, errRedirect
	}
	if rest, ok := strings.CutPrefix(path, "instance/guest-attributes/"); ok {
		at, path = e.guestTree(), rest
	}
	for path != "" {
		name, rest, slash := strings.Cut(path, "/")
		var next any
		ok := false
		switch in := at.(type) {
		case folder:
			next, ok = in[name]
		case attributes:
			next, ok = in[name]
		case list:
			if i, err := strconv.Atoi(name); err == nil && i >= 0 && i < len(in) {
				next, ok = in[i], true
			}
		}
		if !ok {
			return nil, errNotFound
		}
		switch next.(type) {
		case folder, attributes, list:
			if !slash {
				return nil, errRedirect
			}
		default:
			if slash {
				return nil, errNotFound
			}
		}
		at, path = next, rest
	}
	return at, nil
}

// names is a folder's listing, one name a line, folders with a slash.
func names(at any) (string, bool) {
	var children map[string]any
	switch in := at.(type) {
	case folder:
		children = in
	case attributes:
		children = in
	case list:
		children = make(map[string]any, len(in))
		for i, f := range in {
			children[strconv.Itoa(i)] = f
		}
	default:
		return "", false
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(children)) {
		b.WriteString(name)
		switch children[name].(type) {
		case folder, attributes, list:
			b.WriteByte('/')
		}
		b.WriteByte('\n')
	}
	return b.String(), true
}

var hyphen = regexp.MustCompile(`-[a-z]`)

// plain is what JSON shows of a subtree.
func plain(at any) any {
	switch in := at.(type) {
	case folder:
		out := make(map[string]any, len(in))
		for name, value := range in {
			if _, hidden := value.(secret); hidden {
				continue
			}
			if !strings.Contains(name, "@") { // an account's e-mail is no word
				name = hyphen.ReplaceAllStringFunc(name, func(s string) string {
					return strings.ToUpper(s[1:])
				})
			}
			out[name] = plain(value)
		}
		return out
	case attributes:
		out := make(map[string]any, len(in))
		for name, value := range in {
			out[name] = plain(value)
		}
		return out
	case list:
		out := make([]any, len(in))
		for i, f := range in {
			out[i] = plain(f)
		}
		return out
	default:
		return at
	}
}

// text is a leaf as text.
func text(leaf any) string {
	switch v := leaf.(type) {
	case []string:
		var b strings.Builder
		for _, line := range v {
			b.WriteString(line + "\n")
		}
		return b.String()
	case bool:
		return strings.ToUpper(strconv.FormatBool(v))
	default:
		return fmt.Sprint(v)
	}
}

// flat is a subtree as text, recursively: a line for each leaf.
func flat(b *strings.Builder, prefix string, at any) {
	each := func(children map[string]any) {
		for _, name := range slices.Sorted(maps.Keys(children)) {
			flat(b, prefix+name+"/", children[name])
		}
	}
	switch in := at.(type) {
	case folder:
		each(in)
	case attributes:
		each(in)
	case list:
		for i, f := range in {
			flat(b, prefix+strconv.Itoa(i)+"/", f)
		}
	case secret:
	default:
		fmt.Fprintf(b, "%s %s\n", strings.TrimSuffix(prefix, "/"), strings.TrimSuffix(text(in), "\n"))
	}
}

// answer is a rendered value.
type answer struct{ body, contentType, etag string }

func (e *Emulator) render(path string, recursive bool, alt string) (answer, error) {
	e.mu.Lock()
	at, err := e.look(path)
	e.mu.Unlock()
	if err != nil {
		return answer{}, err
	}
	a := answer{contentType: "application/text"}
	listing, isFolder := names(at)
	switch {
	case isFolder && !recursive:
		a.body = listing
	case isFolder && alt == "text":
		var b strings.Builder
		flat(&b, "", at)
		a.body = b.String()
	case isFolder || alt == "json":
		if s, ok := at.(secret); ok {
			at = json.RawMessage(s)
		}
		var b strings.Builder
		encoder := json.NewEncoder(&b)
		encoder.SetEscapeHTML(false)
		if err := encoder.Encode(plain(at)); err != nil {
			return answer{}, fmt.Errorf("render %q: %w", path, err)
		}
		a.body, a.contentType = strings.TrimSuffix(b.String(), "\n"), "application/json"
	default:
		a.body = text(at)
		if _, ok := at.(secret); ok {
			a.contentType = "application/json"
		}
	}
	a.etag = fmt.Sprintf("%x", sha256.Sum256([]byte(a.body)))[:16]
	return a, nil
}

// metadata is the metadata server.
func (e *Emulator) metadata(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Metadata-Flavor", "Google")
	h.Set("Server", "Metadata Server for VM")
	if r.Header.Get("X-Forwarded-For") != "" {
		http.Error(w, "Requests with X-Forwarded-For are refused: they came through a proxy.",
			http.StatusForbidden)
		return
	}
	path, ok := strings.CutPrefix(r.URL.Path, metadataPath)
	if !ok {
		switch r.URL.Path {
		case "/":
			io.WriteString(w, "computeMetadata/\n")
		case "/computeMetadata/":
			io.WriteString(w, "v1/\n")
		default:
			http.NotFound(w, r)
		}
		return
	}
	if r.Header.Get("Metadata-Flavor") != "Google" {
		http.Error(w, "Missing Metadata-Flavor:Google header.", http.StatusForbidden)
		return
	}
	if strings.HasPrefix(r.URL.Path+"/", guestPath) {
		e.mu.Lock()
		disabled := e.vm.GuestAttributesDisabled
		e.mu.Unlock()
		if disabled {
			http.Error(w, "Guest attributes endpoint access is disabled.", http.StatusForbidden)
			return
		}
		if r.Method == http.MethodPut || r.Method == http.MethodDelete {
			e.writeGuest(w, r)
			return
		}
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
		return
	}
	e.value(w, r, path)
}

// value answers with a value or folder, at once or when it changes.
func (e *Emulator) value(w http.ResponseWriter, r *http.Request, path string) {
	query := r.URL.Query()
	recursive := strings.EqualFold(query.Get("recursive"), "true")
	ctx := r.Context()
	wait := strings.EqualFold(query.Get("wait_for_change"), "true")
	if s := query.Get("timeout_sec"); s != "" {
		seconds, err := strconv.ParseFloat(s, 64)
		if err != nil || seconds < 0 {
			http.Error(w, fmt.Sprintf("bad timeout_sec %q", s), http.StatusBadRequest)
			return
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(seconds*float64(time.Second)))
		defer cancel()
	}
	last := query.Get("last_etag")
	for first := true; ; first = false {
		e.mu.Lock()
		changed := e.changed // taken before rendering, so that no change falls between the two
		e.mu.Unlock()
		a, err := e.render(path, recursive, query.Get("alt"))
		if wait && first && last == "" {
			last = a.etag
		}
		if err == nil && wait && a.etag == last && ctx.Err() == nil {
			select {
			case <-changed:
				continue
			case <-ctx.Done(): // timeout: the same value with the same ETag
				if r.Context().Err() != nil {
					return
				}
			}
		}
		switch {
		case errors.Is(err, errRedirect):
			target := r.URL.Path + "/"
			if r.URL.RawQuery != "" {
				target += "?" + r.URL.RawQuery
			}
			http.Redirect(w, r, target, http.StatusMovedPermanently)
		case errors.Is(err, errNotFound):
			http.Error(w, "The requested URL was not found on this server.", http.StatusNotFound)
		case err != nil:
			http.Error(w, err.Error(), http.StatusInternalServerError)
		default:
			w.Header().Set("Content-Type", a.contentType)
			w.Header().Set("ETag", a.etag)
			io.WriteString(w, a.body)
		}
		return
	}
}

var guestName = regexp.MustCompile(`^[A-Za-z0-9_-]+/[A-Za-z0-9_-]+$`)

// maxGuestValue is ours: the real limit is not documented.
const maxGuestValue = 256 << 10

func (e *Emulator) writeGuest(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, guestPath)
	if !guestName.MatchString(name) {
		http.Error(w, "a guest attribute is NAMESPACE/KEY, of letters, digits, _ and -",
			http.StatusBadRequest)
		return
	}
	namespace, key, _ := strings.Cut(name, "/")
	value, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxGuestValue))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case r.Method == http.MethodDelete:
		if _, ok := e.guest[namespace][key]; !ok {
			http.Error(w, "The requested URL was not found on this server.", http.StatusNotFound)
			return
		}
		delete(e.guest[namespace], key)
		e.notify()
	case e.budget.exceeded():
		e.budget.lost++
		delete(e.guest[namespace], key)
		e.notify()
	default:
		e.setGuest(namespace, key, string(value))
	}
}
