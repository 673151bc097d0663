// Package batch asks the database for many things of one kind with one commit.
//
// Group commit: questions that arrive while a batch is being dealt with form the next batch. When the database is idle, a question is
// asked at once. A caller who gives up before his question was asked takes it back, and then nothing was written; after that he waits for
// the answer, because what may still be written must not be overtaken. A panic while asking is an error for everybody in that batch only.
package batch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

const (
	// Max is how much the database is asked for at once, at the most.
	Max = 512
	// Timeout is how long a batch may take before all who wait for it are told of a fault.
	Timeout = 30 * time.Second
)

// Batches asks the database for many things of one kind together: while one batch is being dealt with, the next one gathers.
// Who comes when nothing is being dealt with waits for nobody. So many writes are one commit, and whatever comes, one
// connection is enough for it. Each caller has his answer when his own batch is decided.
type Batches[Q, A any] struct {
	// ask deals with a batch and returns an answer for each question. It is never called without any.
	ask func(context.Context, []Q) ([]A, error)
	// turn is full while somebody asks.
	asking chan struct{}

	mu   sync.Mutex   // guards next, and the batches that gather; a leaf, see the lock order in expiration/doc.go
	next *batch[Q, A] // the one that gathers and has room, or nil
}

// batch is what is asked for at once.
type batch[Q, A any] struct {
	questions []Q
	places    []*int // where each caller's question stands: one that is withdrawn makes another move
	begun     bool   // it gathers no longer

	decided chan struct{} // closed when there are answers, or err is set
	answers []A
	err     error
}

// ErrNotAsked: the caller gave up before the database was asked. So nothing was written, and nothing will be.
var ErrNotAsked = errors.New("given up before the database was asked")

// ErrUndecided is what all callers of a batch are told if asking panics.
var ErrUndecided = errors.New("the batch did not come to its end")

// New returns batches of which each is asked for by a function, as Batches.ask says.
func New[Q, A any](ask func(context.Context, []Q) ([]A, error)) *Batches[Q, A] {
	return &Batches[Q, A]{ask: ask, asking: make(chan struct{}, 1)}
}

// Do returns the answer when the question's batch is decided. If the context ends while the batch still gathers, the question is
// withdrawn, and the error is ErrNotAsked and that of the context. Once the database is asked, Do waits for the answer whatever
// becomes of the context: what may still be written must not be overtaken by the next write to the same timer.
//
// One of the callers asks for all of a batch: whoever has the turn first. So none is missed if it gives up while it waits for the turn.
func (b *Batches[Q, A]) Do(ctx context.Context, question Q) (answer A, err error) {
	if err = ctx.Err(); err != nil {
		return answer, fmt.Errorf("%w: %w", ErrNotAsked, err)
	}
	place := new(int)
	mine := b.gather(question, place)
	select {
	case <-mine.decided:
	case b.asking <- struct{}{}:
		b.lead(context.WithoutCancel(ctx), mine)
	case <-ctx.Done():
		if b.withdraw(mine, place) {
			return answer, fmt.Errorf("%w: %w", ErrNotAsked, ctx.Err())
		}
		<-mine.decided
	}
	if mine.err != nil {
		return answer, mine.err
	}
	return mine.answers[*place], nil
}

// gather adds a question to the batch that gathers, and returns that.
func (b *Batches[Q, A]) gather(question Q, place *int) *batch[Q, A] {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == nil || len(b.next.questions) == Max {
		b.next = &batch[Q, A]{decided: make(chan struct{})}
	}
	mine := b.next
	*place = len(mine.questions)
	mine.questions = append(mine.questions, question)
	mine.places = append(mine.places, place)
	return mine
}

// Len returns how many questions gather.
func (b *Batches[Q, A]) Len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == nil {
		return 0
	}
	return len(b.next.questions)
}

// withdraw takes a question out of its batch, and reports whether that still gathered.
func (b *Batches[Q, A]) withdraw(mine *batch[Q, A], place *int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if mine.begun {
		return false
	}
	free, last := *place, len(mine.questions)-1
	mine.questions[free], mine.places[free] = mine.questions[last], mine.places[last]
	*mine.places[free] = free
	clear(mine.questions[last:]) // it may be large
	clear(mine.places[last:])
	mine.questions, mine.places = mine.questions[:last], mine.places[:last]
	return true
}

// lead is called by a caller of a batch that has the turn. It ends the gathering and asks, unless another caller of the batch has done so.
func (b *Batches[Q, A]) lead(ctx context.Context, mine *batch[Q, A]) {
	defer func() { <-b.asking }()
	b.mu.Lock()
	if mine.begun { // and decided: whoever asked had the turn until then
		b.mu.Unlock()
		return
	}
	mine.begun = true
	if b.next == mine {
		b.next = nil
	}
	b.mu.Unlock()
	mine.err = ErrUndecided
	defer close(mine.decided)
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	guard.Run("asking the database", func() { mine.answers, mine.err = b.ask(ctx, mine.questions) })
}

// WithoutAnswers is for what has no answer but that it was done.
func WithoutAnswers[Q any](ask func(context.Context, []Q) error) func(context.Context, []Q) ([]struct{}, error) {
	return func(ctx context.Context, questions []Q) ([]struct{}, error) {
		return make([]struct{}, len(questions)), ask(ctx, questions)
	}
}
