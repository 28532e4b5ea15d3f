"""The paper's numbers beside ours: what each exhibit needs, tables, figures, and their notebooks run as one."""
