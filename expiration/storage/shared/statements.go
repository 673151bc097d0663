package shared

import (
	"context"
	"database/sql"
	"sync"
)

// Statements keeps each statement prepared that it is given: to plan one can take longer than to run it. They are constants,
// so there are few of them.
type Statements struct {
	DB *sql.DB

	mu       sync.Mutex // guards prepared; a leaf
	prepared map[string]*sql.Stmt
}

// Prepare returns the prepared statement.
func (s *Statements) Prepare(ctx context.Context, query string) (*sql.Stmt, error) {
	s.mu.Lock()
	statement := s.prepared[query]
	s.mu.Unlock()
	if statement != nil {
		return statement, nil
	}
	statement, err := s.DB.PrepareContext(ctx, query)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if first := s.prepared[query]; first != nil { // two at the same time
		_ = statement.Close()
		return first, nil
	}
	if s.prepared == nil {
		s.prepared = map[string]*sql.Stmt{}
	}
	s.prepared[query] = statement
	return statement, nil
}

// QueryContext runs a query.
func (s *Statements) QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	statement, err := s.Prepare(ctx, query)
	if err != nil {
		return nil, err
	}
	return statement.QueryContext(ctx, args...)
}

// ExecContext runs a statement that returns no rows.
func (s *Statements) ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error) {
	statement, err := s.Prepare(ctx, query)
	if err != nil {
		return nil, err
	}
	return statement.ExecContext(ctx, args...)
}
