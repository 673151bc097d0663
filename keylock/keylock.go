// Package keylock provides a lock per key, and uses memory only for keys in use. Waiting for a lock obeys a context, which sync.Mutex does
// not. The order in which waiters get a lock is undefined. A lock may also have several places, as a semaphore does.
package keylock

import (
	"context"
	"errors"
	"sync"
)

// Locks is a set of locks, one per key.
type Locks[K comparable] struct {
	places int // how many callers may hold one lock at a time
	most   int // how many callers may hold or wait for one lock; 0 is any number

	mu    sync.Mutex // guards the fields below, and the users of each lock; a leaf
	locks map[K]*lock
}

type lock struct {
	users int           // holders and waiters; at 0 the lock is removed
	held  chan struct{} // has an element for each holder, and room for as many as may hold it
}

// ErrCrowded: as many callers as allowed hold the lock or wait for it.
var ErrCrowded = errors.New("too many callers wait for the lock")

// New returns locks that one caller holds at a time, and for which any number of callers may wait.
func New[K comparable]() *Locks[K] { return WithPlaces[K](1, 0) }

// WithPlaces returns locks, each of which several callers may hold at a time. As many callers as most says may hold it or wait for it.
func WithPlaces[K comparable](places, most int) *Locks[K] {
	return &Locks[K]{places: places, most: most, locks: map[K]*lock{}}
}

// Lock waits for the lock of key, and returns the function that gives it back. The error is ErrCrowded or the context's.
func (l *Locks[K]) Lock(ctx context.Context, key K) (unlock func(), err error) {
	own := l.join(key)
	if own == nil {
		return nil, ErrCrowded
	}
	select {
	case own.held <- struct{}{}:
		return func() { <-own.held; l.leave(key, own) }, nil
	case <-ctx.Done():
		l.leave(key, own)
		return nil, ctx.Err()
	}
}

// join returns nil if the lock is crowded.
func (l *Locks[K]) join(key K) *lock {
	l.mu.Lock()
	defer l.mu.Unlock()
	own := l.locks[key]
	switch {
	case own == nil:
		own = &lock{held: make(chan struct{}, l.places)}
		l.locks[key] = own
	case own.users == l.most: // never with most = 0, because a lock in use has users
		return nil
	}
	own.users++
	return own
}

func (l *Locks[K]) leave(key K, own *lock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if own.users--; own.users == 0 {
		delete(l.locks, key)
	}
}

// Len returns how many locks are in use.
func (l *Locks[K]) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.locks)
}
