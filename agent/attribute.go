package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
)

// goodAttribute is a well-formed attribute. It is a value that nobody changes.
type goodAttribute struct {
	Config attribute.Config
	Text   []byte
	Read   time.Time // when the metadata server gave it
	Kept   bool      // to an earlier run, which kept it
}

// attributeNews is what came of the newest look at the attribute. It always tells the one in force,
// since the loop takes only the newest news.
type attributeNews struct {
	Good   *goodAttribute // in force; nil: none yet
	Err    error          // the attribute itself is missing or malformed
	Source error          // the metadata server gives no usable answer
}

// attributeInForce is the attribute that the loop goes by, and what is wrong with the newest.
type attributeInForce struct {
	Known  bool // Config is an attribute's; else it is the defaults
	Config attribute.Config
	Serial uint64         // counts Configs
	Good   *goodAttribute // where Config is from; nil: none yet, or --config
	Err    error          // the attribute itself is missing or malformed
	Source error          // the metadata server gives no usable answer

	text    []byte   // of the last attribute that this run read; nil: none yet, or from --config
	unknown []string // sets of unknown keys that were reported
}

// take makes news the attribute in force, if it is news.
func (a *attributeInForce) take(n attributeNews, log *zap.Logger) {
	a.Err, a.Source = n.Err, n.Source
	was, good := a.Good, n.Good
	if good == was {
		return
	}
	a.Good = good
	if good == nil { // it was another instance's
		a.Known, a.Config = false, attribute.Default()
		a.Serial++
		return
	}
	// bootstrap reads for itself, and may have seen a newer one than an earlier run kept
	if !good.Kept {
		a.text = good.Text
	}
	if was != nil && bytes.Equal(was.Text, good.Text) {
		return
	}
	a.Known, a.Config = true, good.Config
	a.Serial++
	switch {
	case good.Kept:
		log.Info("the attribute that an earlier run kept is in force", zap.Time("read", good.Read))
	case was != nil:
		log.Info("attribute changed")
	}
	a.reportUnknown(good.Config.Unknown, log)
}

// reportUnknown logs the attribute's unknown keys, the same ones once.
func (a *attributeInForce) reportUnknown(keys []string, log *zap.Logger) {
	set := strings.Join(keys, " ")
	if set == "" || slices.Contains(a.unknown, set) {
		return
	}
	a.unknown = append(a.unknown, set)
	log.Warn("unknown keys in the gce-service-proxy attribute are ignored", zap.Strings("keys", keys))
}

// keptAttribute is the last good attribute as the state folder keeps it for the next
// start, with whose it is.
type keptAttribute struct {
	Text string    `json:"text"`
	Read time.Time `json:"read"`
	// the VM's id, "" where the metadata server did not tell it
	Instance string `json:"instance,omitempty"`
	Machine  string `json:"machine,omitempty"` // machineSum
}

const keptFile = "attribute.json"

// loadKept reads what an earlier run kept; nil without an error: nothing.
func loadKept(dir string) (*keptAttribute, error) {
	text, err := readKept(filepath.Join(dir, keptFile), maxKeptFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	k := &keptAttribute{}
	if err == nil {
		err = json.Unmarshal(text, k)
	}
	if err == nil {
		_, err = attribute.Parse([]byte(k.Text))
	}
	if err != nil {
		return nil, fmt.Errorf("read the attribute kept by an earlier run: %w", err)
	}
	return k, nil
}

// saveKept keeps k for the next start; nil takes away what is kept.
func saveKept(dir string, k *keptAttribute) error {
	path := filepath.Join(dir, keptFile)
	if k == nil {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	text, err := json.Marshal(k)
	if err != nil {
		return err
	}
	// systemd makes it; without, somebody runs the agent by hand
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return atomicfile.Write(path, text, 0o600) // URLs in it may be signed
}

// machineSum stands for this machine without the metadata server, "" where nothing tells. A disk's
// clone may have the same machine-id, but not the same asset tag: Compute Engine puts an UUID of
// the instance there. (product_uuid is the same, and root's alone.)
func machineSum() string {
	return sumOfFiles("/etc/machine-id", "/sys/class/dmi/id/board_asset_tag")
}

func sumOfFiles(paths ...string) string {
	h, known := sha256.New(), false
	for _, path := range paths {
		text, err := os.ReadFile(path)
		text = bytes.TrimSpace(text)
		known = known || err == nil && len(text) > 0
		fmt.Fprintf(h, "%q\n", text)
	}
	if !known {
		return ""
	}
	return hex.EncodeToString(h.Sum(nil))[:32]
}

// attributeSource decides which attribute is in force: the newest good one; until this run has read
// one, that of an earlier run, if it is this VM's own.
type attributeSource struct {
	kept *keptAttribute // nil: none, or out of date
	good *goodAttribute
}

// next is what a look makes of it. instance is the VM's id, "" while the metadata server has not
// told it: then the machine must do. foreign: what was kept is another instance's, and is dropped.
func (s *attributeSource) next(look metadata.Attribute, instance, machine string,
	now time.Time) (news attributeNews, foreign bool) {
	if look.Err == nil {
		s.kept, s.good = nil, &goodAttribute{Config: look.Config, Text: look.Text, Read: now}
		return attributeNews{Good: s.good}, false
	}
	if k := s.kept; k != nil {
		known := instance != "" && k.Instance != ""
		switch {
		case known && instance != k.Instance:
			s.kept, s.good, foreign = nil, nil, true
		case !known && (machine == "" || machine != k.Machine):
			s.good = nil // the id may still tell that it is ours
		case s.good == nil:
			if config, err := attribute.Parse([]byte(k.Text)); err == nil { // loadKept has seen to it
				s.good = &goodAttribute{Config: config, Text: []byte(k.Text), Read: k.Read, Kept: true}
			}
		}
	}
	news = attributeNews{Good: s.good, Err: look.Err}
	var source *metadata.Error
	if errors.As(look.Err, &source) {
		news.Source, news.Err = look.Err, nil
	}
	return news, foreign
}

// watchAttribute passes on what the metadata server says of the attribute, and has the last good
// one kept for the next start.
func (a *Agent) watchAttribute(ctx context.Context) error {
	kept, err := loadKept(a.settings.StateDir)
	if err != nil {
		a.log.Warn("no attribute of an earlier run", zap.Error(err))
	}
	source, machine, instance := attributeSource{kept: kept}, machineSum(), ""
	answered := func() { a.answered.Store(new(time.Now())) }
	metadata.Watch(ctx, answered, func(look metadata.Attribute) {
		away := new(metadata.Error)
		if source.kept != nil && look.Err != nil && instance == "" && !errors.As(look.Err, &away) {
			instance, _ = metadata.ReadInstance(ctx) // whom the kept one must belong to
		}
		news, foreign := source.next(look, instance, machine, time.Now().UTC())
		a.attributes.Put(news)
		switch {
		case foreign:
			a.log.Warn("the attribute kept in the state folder is another instance's and is discarded",
				zap.String("of", kept.Instance), zap.String("this", instance))
			a.kept.attribute.Put(nil)
		case look.Err == nil:
			if instance == "" {
				instance, _ = metadata.ReadInstance(ctx) // without it, the machine tells whose it is
			}
			a.kept.attribute.Put(&keptAttribute{Text: string(news.Good.Text), Read: news.Good.Read,
				Instance: instance, Machine: machine})
		}
	})
	return nil
}

// metadataAnswered is when the metadata server last gave a usable answer about the attribute; zero:
// not yet.
func (a *Agent) metadataAnswered() time.Time {
	if at := a.answered.Load(); at != nil {
		return *at
	}
	return time.Time{}
}
