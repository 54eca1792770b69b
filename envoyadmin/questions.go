package envoyadmin

import (
	"sync"
	"time"
)

// Question is one of the things that a Client asks.
type Question uint8

// The questions, by what they are for: a path may be asked for more than one.
const (
	DumpQuestion       Question = iota // the listeners as a whole, or routes
	LookQuestion                       // the masked dump: has anything moved?
	ReadyQuestion                      // is it live?
	ServerInfoQuestion                 // who is it?
	BootstrapQuestion                  // where is its control plane?
	StatsQuestion                      // counters and gauges
	ClustersQuestion                   // the health of all endpoints
	order                              // what is no question but a change, and is not booked
)

// String is the question's name in metrics.
func (q Question) String() string {
	names := [...]string{"dump", "look", "ready", "server_info", "bootstrap", "stats", "clusters"}
	if int(q) < len(names) {
		return names[q]
	}
	return "order"
}

// Asked is what a Client has asked since it was made.
type Asked struct {
	Questions [order]Cost // by Question
	Answered  time.Time   // when the last one that was answered was sent; zero: none was
}

// Cost is what the questions of one kind came to.
type Cost struct {
	Count uint64 // answered or not
	// Took is the time from asking to the end of the answer, or of waiting for it. Envoy's main thread
	// is busy for about that long, but where an answer waits for something else.
	Took time.Duration
	// Lost is how much of Took came to no answer that can be used.
	Lost time.Duration
}

// book keeps the costs of a Client's questions.
type book struct {
	mu    sync.Mutex
	asked Asked
}

// note books a question.
func (b *book) note(q Question, sent, ended time.Time, err error) {
	if q >= order {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked.Questions[q].Count++
	b.asked.Questions[q].Took += ended.Sub(sent)
	if err != nil {
		b.asked.Questions[q].Lost += ended.Sub(sent)
	}
	if err == nil && sent.After(b.asked.Answered) {
		b.asked.Answered = sent
	}
}

// Asked tells what was asked so far.
func (c *Client) Asked() Asked {
	c.book.mu.Lock()
	defer c.book.mu.Unlock()
	return c.book.asked
}
