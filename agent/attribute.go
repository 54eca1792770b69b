package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
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
	identity.Owner
}

const keptFile = progress.AttributeFile

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

// saveKept keeps k for the next start.
func saveKept(dir string, k *keptAttribute) error {
	text, err := json.Marshal(k)
	if err != nil {
		return err
	}
	return keepFile(dir, keptFile, text)
}

// attributeSource decides which attribute is in force: the newest good one; until this run has read
// one, that of an earlier run on this VM.
type attributeSource struct {
	kept *keptAttribute // nil: none, or out of date
	good *goodAttribute
}

// next is what a look makes of it.
func (s *attributeSource) next(look metadata.Attribute, now time.Time) (news attributeNews) {
	if look.Err == nil {
		s.kept, s.good = nil, &goodAttribute{Config: look.Config, Text: look.Text, Read: now}
		return attributeNews{Good: s.good}
	}
	if k := s.kept; k != nil && s.good == nil {
		if config, err := attribute.Parse([]byte(k.Text)); err == nil { // loadKept has seen to it
			s.good = &goodAttribute{Config: config, Text: []byte(k.Text), Read: k.Read, Kept: true}
		}
	}
	news = attributeNews{Good: s.good, Err: look.Err}
	var source *metadata.Error
	if errors.As(look.Err, &source) {
		news.Source, news.Err = look.Err, nil
	}
	return news
}

// watchAttribute passes on what the metadata server says of the attribute, and has the last good
// one kept for the next start.
func (a *Agent) watchAttribute(ctx context.Context) error {
	of := &a.kept.whose
	kept, err := loadKept(a.settings.StateDir)
	if err != nil {
		a.log.Warn("no attribute of an earlier run", zap.Error(err))
	}
	if kept != nil && !of.now().Judge(kept.Owner).Believed() {
		kept = nil
	}
	source := attributeSource{kept: kept}
	answered := func() { a.answered.Store(new(time.Now())) }
	metadata.Watch(ctx, answered, func(look metadata.Attribute) {
		news := source.next(look, time.Now().UTC())
		a.attributes.Put(news)
		if look.Err == nil {
			// It says whose it is; without the id, the machine does. (What else the id may tell
			// is watchWhose's.)
			_ = of.learn(ctx, metadata.ReadInstance)
			a.kept.attribute.Put(&keptAttribute{Text: string(news.Good.Text), Read: news.Good.Read,
				Owner: of.owner()})
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
