package systemd

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/coreos/go-systemd/v22/journal"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

// The journal's fields are ours where they begin so; SERVICE_PROXY_CAUSE and _NEXT are what the
// catalog shows.
const fieldPrefix = "SERVICE_PROXY_"

const (
	journalSocket = "/run/systemd/journal/socket"
	stderr        = 2

	// syslogFacility is "user" (sd-daemon(3), SyslogFacility= in the units for what does not come this
	// way). Compute Engine's images have rsyslog write the facilities daemon, which is systemd's
	// default for a service, and kern to the console (/etc/rsyslog.d/90-google.conf: `daemon,kern.*
	// /dev/console`), where the agent writes its own lines.
	// See docs/design/facts.md#gce-console-gets-daemon.
	syslogFacility = 1

	// maxValue is the most bytes of a value: journalctl fills in no larger one than PATH_MAX, name
	// included, in the catalog's text. With maxFields of them an entry is below what a socket sends
	// in one datagram (net.core.wmem_default, 208 KiB), so that no file has to be made for it.
	maxValue  = 4000
	maxFields = 32
	maxName   = 64 // journald's limit
)

// InJournal says that what this process writes to stderr goes to the journal: JOURNAL_STREAM holds
// the device and inode of its stderr (systemd.exec(5)). The variable alone does not say so:
// children whose stderr leads elsewhere inherit it.
func InJournal() bool {
	is, err := journal.StderrIsJournalStream()
	return is && err == nil
}

// Journal is a [zapcore.Core] that writes to the journal in its own protocol. MESSAGE is the
// message with the fields that it does not tell by itself, and each field is one of the journal's,
// too: "cause" becomes SERVICE_PROXY_CAUSE.
//
// It never waits. An entry that journald does not take, because it is away or hangs, goes as text
// to stderr, which is journald's other socket, and holds some hundred KiB. When that is full, too,
// it is lost: that is counted, and told with the next entry that comes through.
type Journal struct {
	zapcore.LevelEnabler
	with []zapcore.Field
	out  *journalOut
}

// NewJournal returns a Journal that writes as this program. messageID is the MESSAGE_ID of an entry
// about the symptom with this ID, with its cause or, when it is over, without.
func NewJournal(
	level zapcore.LevelEnabler, program string, messageID func(id string, over bool) string,
) (*Journal, error) {
	return newJournal(level, program, messageID, journalSocket, stderr)
}

func newJournal(
	level zapcore.LevelEnabler, program string, messageID func(id string, over bool) string,
	socket string, stderr int,
) (*Journal, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket for the journal: %w", err)
	}
	return &Journal{LevelEnabler: level, out: &journalOut{program: program, messageID: messageID,
		fd: fd, to: &unix.SockaddrUnix{Name: socket}, stderr: stderr}}, nil
}

// With implements [zapcore.Core].
func (j *Journal) With(fields []zapcore.Field) zapcore.Core {
	with := *j
	with.with = slices.Concat(j.with, fields)
	return &with
}

// Check implements [zapcore.Core].
func (j *Journal) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if j.Enabled(e.Level) {
		return checked.AddCore(e, j)
	}
	return checked
}

// Write implements [zapcore.Core]. It returns no error: there is nobody left to tell.
func (j *Journal) Write(e zapcore.Entry, fields []zapcore.Field) error {
	j.out.write(e, pairs(slices.Concat(j.with, fields)))
	return nil
}

// Sync implements [zapcore.Core]. Nothing is kept back.
func (j *Journal) Sync() error { return nil }

// journalOut is what Journals of one program share.
type journalOut struct {
	program   string
	messageID func(id string, over bool) string
	fd        int // not connected: the socket may be made anew
	to        unix.Sockaddr
	stderr    int

	mu   sync.Mutex
	lost int // entries that nobody took
}

func (o *journalOut) write(e zapcore.Entry, fields []pair) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.lost > 0 {
		e := zapcore.Entry{Time: e.Time, Level: zapcore.WarnLevel,
			Message: "log lines were lost, as journald took none"}
		if o.send(e, []pair{{"lines", strconv.Itoa(o.lost)}}) {
			o.lost = 0
		}
	}
	if !o.send(e, fields) {
		o.lost++
	}
}

// send says whether somebody took the entry.
func (o *journalOut) send(e zapcore.Entry, fields []pair) bool {
	text, priority := message(e.Message, fields), priority(e.Level)
	if sendNow(o.fd, o.record(text, priority, e.Level, fields), o.to) == nil {
		return true
	}
	// The prefix is that of sd-daemon(3). journald may read the line much later, and knows its time by
	// that alone.
	line := fmt.Sprintf("<%d>%s %s\n", priority, e.Time.UTC().Format(time.RFC3339), text)
	return sendNow(o.stderr, []byte(line), nil) == nil
}

// sendNow sends without waiting: journald may be stopped, its socket full. (journal.Send of
// go-systemd waits there, and when the socket is full of other programs' entries nothing wakes it.)
func sendNow(fd int, text []byte, to unix.Sockaddr) error {
	for {
		n, err := unix.SendmsgN(fd, text, nil, to, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil && n < len(text):
			return unix.EAGAIN
		}
		return err
	}
}

// record is an entry in the form of systemd.io/JOURNAL_NATIVE_PROTOCOL.
func (o *journalOut) record(
	text string, priority journal.Priority, level zapcore.Level, fields []pair,
) []byte {
	var out bytes.Buffer
	add := func(name, value string) {
		out.WriteString(name)
		if strings.ContainsRune(value, '\n') {
			out.WriteByte('\n')
			_ = binary.Write(&out, binary.LittleEndian, uint64(len(value))) // to memory
		} else {
			out.WriteByte('=')
		}
		out.WriteString(value)
		out.WriteByte('\n')
	}
	add("MESSAGE", text)
	add("PRIORITY", strconv.Itoa(int(priority)))
	add("SYSLOG_FACILITY", strconv.Itoa(syslogFacility))
	add("SYSLOG_IDENTIFIER", o.program)
	id, cause := value(fields, "id"), value(fields, "cause")
	switch {
	case id != "" && cause != "":
		add("MESSAGE_ID", o.messageID(id, false))
		if value(fields, "next") == "" {
			// journalctl would print the field's name in the catalog's text.
			fields = append(slices.Clone(fields), pair{"next", "none but what the cause says"})
		}
	case id != "" && level == zapcore.InfoLevel:
		add("MESSAGE_ID", o.messageID(id, true))
	}
	for _, f := range fields[:min(len(fields), maxFields)] {
		add(fieldName(f.key), f.value)
	}
	return out.Bytes()
}

func priority(level zapcore.Level) journal.Priority {
	switch {
	case level <= zapcore.DebugLevel:
		return journal.PriDebug
	case level == zapcore.InfoLevel:
		return journal.PriInfo
	case level == zapcore.WarnLevel:
		return journal.PriWarning
	case level == zapcore.ErrorLevel:
		return journal.PriErr
	}
	return journal.PriCrit
}

// fieldName is the journal's name of a field: A to Z, 0 to 9 and _, at most 64 bytes.
func fieldName(key string) string {
	name := fieldPrefix + strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, key)
	return name[:min(len(name), maxName)]
}

// pair is a field as text.
type pair struct{ key, value string }

func value(fields []pair, key string) string {
	for _, f := range fields {
		if f.key == key {
			return f.value
		}
	}
	return ""
}

// pairs are the fields as text, in their order. An error is its text, without the stack or the
// parts that some kinds of error have besides.
func pairs(fields []zapcore.Field) (all []pair) {
	for _, f := range fields {
		enc := zapcore.NewMapObjectEncoder()
		f.AddTo(enc)
		if f.Type == zapcore.ErrorType {
			delete(enc.Fields, f.Key+"Verbose")
			delete(enc.Fields, f.Key+"Causes")
		}
		for _, key := range slices.Sorted(maps.Keys(enc.Fields)) {
			all = append(all, pair{key, cut(asText(enc.Fields[key]))})
		}
	}
	return all
}

func asText(value any) string {
	switch v := value.(type) {
	case []byte:
		return string(v)
	case time.Time:
		return v.Format(time.RFC3339Nano)
	case []any:
		words := make([]string, len(v))
		for i := range v {
			words[i] = asText(v[i])
		}
		return strings.Join(words, ", ")
	case map[string]any:
		if text, err := json.Marshal(v); err == nil {
			return string(text)
		}
	}
	return fmt.Sprint(value)
}

// cut bounds a value, at the end of a character.
func cut(text string) string {
	if len(text) <= maxValue {
		return text
	}
	end := maxValue - len("…")
	for end > 0 && !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + "…"
}

// message is what a reader of the journal sees by default: the message, and after it what it does
// not tell by itself, since most of our messages are constant and have their facts in fields. What
// a finding has for programs is left out. An error comes last, as its words may be long.
func message(text string, fields []pair) string {
	finding := value(fields, "id") != ""
	var out strings.Builder
	out.WriteString(text)
	var reason string
	for _, f := range fields[:min(len(fields), maxFields)] {
		switch {
		case finding && slices.Contains([]string{"id", "key", "cause", "next"}, f.key):
		case f.value == "" || says(text, f.value):
		case f.key == "error":
			reason = f.value
		default:
			out.WriteString(" " + f.key + "=" + quoted(f.value))
		}
	}
	if reason != "" {
		out.WriteString(": " + reason)
	}
	// journalctl shows an entry with control characters as "[blob data]", and stderr is read by lines.
	return cut(strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r // what is no UTF-8 comes as U+FFFD
	}, out.String()))
}

// quoted is a value in quotes where it is not one word.
func quoted(value string) string {
	if strings.ContainsFunc(value, func(r rune) bool {
		return unicode.IsSpace(r) || unicode.IsControl(r) || r == '"' || r == '='
	}) {
		return strconv.Quote(value)
	}
	return value
}

// says says whether the text has the value as a word of its own.
func says(text, value string) bool {
	for at := 0; ; {
		i := strings.Index(text[at:], value)
		if i < 0 {
			return false
		}
		before, _ := utf8.DecodeLastRuneInString(text[:at+i])
		after, _ := utf8.DecodeRuneInString(text[at+i+len(value):])
		if !isWord(before) && !isWord(after) {
			return true
		}
		at += i + 1
	}
}

func isWord(r rune) bool { return unicode.IsLetter(r) || unicode.IsDigit(r) }
