package expiration

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"testing"

	"github.com/stretchr/testify/require"
)

// The table says of each reason what follows from it.
func TestReasons(t *testing.T) {
	source, err := parser.ParseFile(token.NewFileSet(), "errors.go", nil, 0)
	require.NoError(t, err)
	n := 0
	ast.Inspect(source, func(node ast.Node) bool {
		if constant, ok := node.(*ast.ValueSpec); ok {
			if of, ok := constant.Type.(*ast.Ident); ok && of.Name == "DropReason" {
				n++
			}
		}
		return true
	})
	require.Len(t, reasons, n)
}

func TestDropErrorSaysWhy(t *testing.T) {
	err := fmt.Errorf("closing: %w", &DropError{Reason: Forbidden, Cause: errFault})
	require.ErrorIs(t, err, errFault)
	require.Contains(t, err.Error(), "forbidden")
	require.True(t, isFinal(err))
	require.False(t, isFinal(errors.New("x")))
}
