// Package keylock provides a lock per key, and uses memory only for keys in use. Waiting for a lock obeys a context, which sync.Mutex does
// not. The order in which waiters get a lock is undefined.
package keylock

import (
	"context"
	"sync"
)

// Locks is a set of locks, one per key.
type Locks[K comparable] struct {
	mu    sync.Mutex // guards the fields below, and the users of each lock; a leaf
	locks map[K]*lock
}

type lock struct {
	users int           // holders and waiters; at 0 the lock is removed
	held  chan struct{} // has capacity 1; full while the lock is held
}

// New returns locks, of which none is held.
func New[K comparable]() *Locks[K] { return &Locks[K]{locks: map[K]*lock{}} }

// Lock waits for the lock of key, and returns the function that gives it back. The error is the context's.
func (l *Locks[K]) Lock(ctx context.Context, key K) (unlock func(), err error) {
	own := l.join(key)
	select {
	case own.held <- struct{}{}:
		return func() { <-own.held; l.leave(key, own) }, nil
	case <-ctx.Done():
		l.leave(key, own)
		return nil, ctx.Err()
	}
}

func (l *Locks[K]) join(key K) *lock {
	l.mu.Lock()
	defer l.mu.Unlock()
	own := l.locks[key]
	if own == nil {
		own = &lock{held: make(chan struct{}, 1)}
		l.locks[key] = own
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
